"""Starting points lie on their support, are spread out and follow torch's seed."""

import pytest
import torch
from pyro.distributions import constraints as C

from pyro_ebm.ops.constraints import segments, sphere, spins
from pyro_ebm.ops.initial_points import initial_points

SUPPORTS = [
    (C.real, ()),
    (C.independent(C.positive, 2), (2, 3)),
    (C.interval(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 7.0])), (2,)),
    (C.simplex, (4,)),
    (C.corr_cholesky, (3, 3)),
    (C.boolean, (2, 2)),
    (spins, (4,)),
    (C.integer_interval(2, 5), ()),
    (C.integer_interval(0, torch.tensor([1, 9])), (2,)),
    (C.nonnegative_integer, (2,)),
    (C.positive_integer, (2,)),
    (C.integer, (2,)),
    (C.one_hot, (4,)),
    (C.independent(C.one_hot, 1), (2, 4)),
    (sphere, (3,)),
    (C.independent(sphere, 1), (2, 3)),
    (C.cat([C.real, C.boolean, C.positive_integer], -1, [2, 2, 1]), (5,)),
    (C.cat([C.simplex, C.boolean, sphere], -1, [3, 1, 2]), (6,)),
    (C.stack([C.real, spins], -1), (2,)),
]


@pytest.mark.parametrize(("support", "event_shape"), SUPPORTS, ids=str)
def test_points_lie_on_the_support(support, event_shape):
    event_shape = torch.Size(event_shape)
    x = initial_points(support, torch.Size([50, 3]), event_shape)
    assert x.shape == (50, 3) + event_shape
    for part in segments(support, event_shape):
        assert part.constraint.check(x[..., part.columns]).all()
    assert (x.std(0) > 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("support", [C.boolean, spins, C.nonnegative_integer], ids=str)
def test_discrete_points_take_any_dtype(support, dtype):
    x = initial_points(support, torch.Size([5]), torch.Size([2]), dtype=dtype)
    assert x.dtype == dtype


def test_default_dtype_is_torchs():
    torch.set_default_dtype(torch.float64)
    assert initial_points(C.simplex, torch.Size([2]), torch.Size([3])).dtype == torch.float64


@pytest.mark.parametrize(("support", "event_shape"), SUPPORTS, ids=str)
def test_seed_decides(support, event_shape):
    def draw(seed):
        torch.manual_seed(seed)
        return initial_points(support, torch.Size([40]), torch.Size(event_shape))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_finite_values_are_equally_likely():
    x = initial_points(C.integer_interval(0, 3), torch.Size([8000]), torch.Size([]))
    counts = torch.bincount(x.long(), minlength=4)
    assert (counts - 2000).abs().max() < 5 * (8000 * 0.25 * 0.75) ** 0.5


def test_values_between_bounds_of_each_site_are_equally_likely():
    lower, upper = torch.tensor([0, 2, -5]), torch.tensor([1, 9, -5])
    x = initial_points(C.integer_interval(lower, upper), torch.Size([8000]), torch.Size([3]))
    for column, low, high in zip(x.T, lower.tolist(), upper.tolist(), strict=True):
        counts = torch.bincount(column.long() - low)
        assert len(counts) == high - low + 1
        share = 1 / len(counts)
        assert (counts - 8000 * share).abs().max() <= 5 * (8000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("support", [C.multinomial(3), C.positive_definite, C.dependent], ids=str)
def test_support_without_points_is_named(support):
    with pytest.raises(NotImplementedError, match="support"):
        initial_points(support, torch.Size([2]), torch.Size([3, 3]))
