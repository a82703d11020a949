"""What supports say of themselves: measure, values, columns."""

import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.ops.constraints import (
    base_measure,
    event_support,
    finite_values,
    integer_bounds,
    is_integer,
    plain,
    segments,
    site_values,
    sphere,
    spins,
)

C = constraints


def test_spins_check():
    x = torch.tensor([-1.0, 1.0, 0.0, 0.5, float("nan")])
    assert spins.check(x).tolist() == [True, True, False, False, False]
    assert spins.check(torch.tensor([-1, 1])).all()
    assert spins.is_discrete
    assert spins.event_dim == 0
    assert type(pickle.loads(pickle.dumps(spins))) is type(spins)


def test_sphere_is_pyros():
    assert sphere is constraints.sphere


def gaussian_mixture():
    components = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components)


@pytest.mark.parametrize(
    ("support", "measure"),
    [
        (C.real, "lebesgue"),
        (C.independent(C.positive, 2), "lebesgue"),
        (C.simplex, "lebesgue"),
        (C.corr_cholesky, "lebesgue"),
        (C.boolean, "counting"),
        (C.independent(C.independent(C.boolean, 1), 1), "counting"),
        (C.one_hot, "counting"),
        (C.nonnegative_integer, "counting"),
        (spins, "counting"),
        (sphere, "surface"),
        (C.independent(sphere, 1), "surface"),
        (C.cat([C.real, C.positive], -1), "lebesgue"),
        (C.cat([C.boolean, spins], -1), "counting"),
        (C.cat([C.real, C.boolean], -1), "mixed"),
        (C.independent(C.cat([C.real, C.boolean], -1), 1), "mixed"),
        (C.stack([C.real, C.boolean], -1), "mixed"),
        (C.cat([C.real, sphere], -1), "mixed"),
        (C.cat([C.cat([C.real, C.boolean], -1), C.real], -1), "mixed"),
        (gaussian_mixture().support, "lebesgue"),
    ],
    ids=str,
)
def test_base_measure(support, measure):
    assert base_measure(support) == measure


def test_base_measure_of_a_dependent_support_asks_for_one():
    with pytest.raises(NotImplementedError, match="give support="):
        base_measure(C.dependent)


def test_plain_looks_through_all_wrappers():
    assert plain(C.independent(C.independent(spins, 1), 2)) is spins
    assert plain(gaussian_mixture().support) is C.real


@pytest.mark.parametrize("event_dim", [0, 1, 3])
def test_event_support_spans_the_event(event_dim):
    support = event_support(C.positive, event_dim)
    assert support.event_dim == event_dim
    assert support.check(torch.ones(4, 3, 2)).shape == (4, 3, 2)[: 3 - event_dim]


def test_event_support_keeps_what_fits_and_refuses_what_is_too_large():
    assert event_support(C.simplex, 1) is C.simplex
    with pytest.raises(ValueError, match="event_dim 1, but events have 0"):
        event_support(C.simplex, 0)


@pytest.mark.parametrize(
    ("support", "values"),
    [
        (C.boolean, [0.0, 1.0]),
        (spins, [-1.0, 1.0]),
        (C.integer_interval(2, 4), [2.0, 3.0, 4.0]),
        (C.integer_interval(torch.tensor([1.0, 1.0]), 2), [1.0, 2.0]),
        (C.independent(C.boolean, 1), [0.0, 1.0]),
        (dist.Categorical(torch.ones(3)).support, [0.0, 1.0, 2.0]),
    ],
    ids=str,
)
def test_finite_values(support, values):
    assert finite_values(support).tolist() == values


@pytest.mark.parametrize(
    "support",
    [C.real, C.nonnegative_integer, C.one_hot, C.integer_interval(0, torch.tensor([1, 2])), sphere],
    ids=str,
)
def test_no_finite_values(support):
    assert finite_values(support) is None


def test_site_values_of_one_hot_are_unit_vectors():
    assert torch.equal(site_values(C.one_hot, torch.Size([3])), torch.eye(3))
    assert site_values(C.boolean, torch.Size([3])).shape == (2,)


def test_integers_and_their_bounds():
    assert [is_integer(s) for s in (C.nonnegative_integer, C.integer, C.real, C.multinomial)] == [
        True,
        True,
        False,
        False,
    ]
    lower, upper = integer_bounds(C.nonnegative_integer)
    assert int(lower) == 0
    assert upper is None
    lower, upper = integer_bounds(C.integer_interval(-1, torch.tensor([2, 3])))
    assert int(lower) == -1
    assert upper.tolist() == [2, 3]


@pytest.mark.parametrize("dim", [-1, 0])
def test_segments_of_a_cat_follow_its_lengths(dim):
    support = C.cat([C.real, C.boolean, C.simplex], dim, [2, 1, 3])
    parts = segments(event_support(support, 1), torch.Size([6]))
    assert [part.columns for part in parts] == [slice(0, 2), slice(2, 3), slice(3, 6)]
    assert [part.constraint for part in parts] == support.cseq


def test_segments_of_a_stack_have_width_one():
    parts = segments(C.stack([C.real, C.boolean], -1), torch.Size([2]))
    assert [part.columns for part in parts] == [slice(0, 1), slice(1, 2)]


def test_anything_else_is_one_segment():
    support = C.independent(C.positive, 1)
    assert segments(support, torch.Size([3])) == [(slice(None), support)]


def test_cat_along_another_dim_is_refused():
    support = C.cat([C.real, C.boolean], 0, [2, 2])
    with pytest.raises(NotImplementedError, match="along the last event dim only, got dim=0"):
        segments(support, torch.Size([4, 3]))


def test_lengths_must_fill_the_event():
    with pytest.raises(ValueError, match="add up to 2, but the last event dim has size 5"):
        segments(C.cat([C.real, C.boolean], -1), torch.Size([5]))
