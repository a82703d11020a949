"""Ladders of discrete sites: where every kind of value moves, column by column."""

import pytest
import torch
from pyro.distributions import constraints as C
from torch.distributions.constraints import Constraint, integer_interval
from torch.distributions.constraints import _IntegerLessThan as AtMost

from pyro_ebm.infer.discrepancy.perturbed_space import Sites
from pyro_ebm.ops.constraints import spins
from pyro_ebm.ops.ladders import ladder_of

AROUND = torch.tensor([-1, 1, 2])
KINDS = [  # a support, a value, and where it goes by -1, 1 and 2
    (C.boolean, 1, [0, 0, 1]),
    (spins, -1, [1, 1, -1]),
    (integer_interval(1, 3), 3, [2, 1, 2]),
    (C.nonnegative_integer, 0, [0, 1, 2]),
    (C.positive_integer, 4, [3, 5, 6]),
    (AtMost(7), 7, [7, 6, 5]),
    (AtMost(7), 4, [5, 3, 2]),
    (C.integer, -2, [-3, -1, 0]),
]
DTYPES = [torch.float32, torch.float64, torch.int64, torch.uint8]


class Even(Constraint):
    """Discrete, and it does not say what its values are."""

    is_discrete = True
    event_dim = 0


@pytest.mark.parametrize(("support", "value", "want"), KINDS)
def test_moves_of_one_site(support, value, want):
    ladder = ladder_of(support, torch.Size([]))
    assert ladder.moved(torch.tensor(float(value)), AROUND).tolist() == want


@pytest.mark.parametrize("join", ["cat", "stack"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_move_by_their_own_ladders(join, dtype):
    kinds = [kind for kind in KINDS if dtype != torch.uint8 or kind[1] > 1]
    support = getattr(C, join)([kind[0] for kind in kinds], -1)
    ladder = ladder_of(C.independent(support, 1 - support.event_dim), torch.Size([len(kinds)]))
    moved = ladder.moved(torch.tensor([kind[1] for kind in kinds], dtype=dtype), AROUND)
    assert moved.dtype == dtype
    assert moved.T.tolist() == [kind[2] for kind in kinds]


def test_columns_of_several_sites_and_rows():
    """Bounds of two columns for every row, beside a column of bits for all."""
    own = integer_interval(0, torch.tensor([[1, 2], [3, 4], [5, 6]]))
    ladder = ladder_of(C.cat([C.boolean, own], -1, [1, 2]), torch.Size([3]))
    assert ladder.num.tolist() == [[2, 2, 3], [2, 4, 5], [2, 6, 7]]
    last = torch.tensor([[1.0, 1.0, 2.0], [1.0, 3.0, 4.0], [1.0, 5.0, 6.0]])
    assert (ladder.moved(last, torch.tensor([1])) == 0).all()
    assert ladder.shared_num() == 0


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_large_counts_move_by_one(default, dtype):
    """Singles know no 2^24 + 1."""
    torch.set_default_dtype(default)  # undone after every test
    x = torch.tensor([2**24 + 1, 50_000_001], dtype=dtype)
    ladder = ladder_of(C.nonnegative_integer, torch.Size([]))
    assert (ladder.moved(x, AROUND) - x).tolist() == [[-1, -1], [1, 1], [2, 2]]
    wide = Sites.of(integer_interval(0, 2**26), torch.Size([2]), "A test")
    assert wide.value(wide.numbers(x), x).tolist() == x.tolist()


@pytest.mark.parametrize(
    "support",
    [C.real, C.one_hot, C.multinomial, Even(), C.cat([C.cat([C.boolean, spins], -1), spins], -1)],
    ids=str,
)
def test_what_has_no_ladder(support):
    assert ladder_of(support, torch.Size([2])) is None


def test_bounds_for_other_events_have_no_ladder():
    support = integer_interval(torch.zeros(3), torch.ones(3))
    assert ladder_of(support, torch.Size([2])) is None
    assert ladder_of(support, torch.Size([1])) is None
    assert ladder_of(support, torch.Size([3])) is not None


@pytest.mark.parametrize(
    ("support", "num"),
    [
        (C.cat([spins, spins], -1), 2),
        (integer_interval(torch.zeros(2), torch.full((2,), 4)), 5),
        (C.cat([C.boolean, spins], -1), 0),
        (C.cat([integer_interval(0, 1), integer_interval(1, 2)], -1), 0),
        (C.nonnegative_integer, 0),
    ],
)
def test_shared_number_of_values(support, num):
    assert ladder_of(support, torch.Size([2])).shared_num() == num
