"""Unconstrained coordinates: round trips and Jacobians of every continuous support."""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints as C

from pyro_ebm.ops.constraints import event_support, spins
from pyro_ebm.ops.spaces import UnconstrainedSpace, bijection, has_ends, is_at_end

bounds = torch.tensor([0.0, 5.0], dtype=torch.float64), torch.tensor([1.0, 7.0]).double()

# support, event shape, number of coordinates
SUPPORTS = [
    (C.real, (), 1),
    (C.real, (2, 3), 6),
    (C.positive, (2,), 2),
    (C.less_than(2.0), (), 1),
    (C.unit_interval, (2,), 2),
    (C.interval(*bounds), (2,), 2),
    (C.simplex, (4,), 3),
    (C.independent(C.simplex, 1), (2, 4), 6),
    (C.corr_cholesky, (3, 3), 3),
    (C.ordered_vector, (3,), 3),
    (C.positive_ordered_vector, (3,), 3),
    (C.cat([C.real, C.positive], -1, [2, 1]), (3,), 3),
    (C.cat([C.real, C.positive], 0, [2, 1]), (3,), 3),
    (C.cat([C.simplex, C.real], -1, [3, 2]), (5,), 4),
]


@pytest.mark.parametrize(("support", "event_shape", "size"), SUPPORTS, ids=str)
def test_round_trip(support, event_shape, size):
    space = UnconstrainedSpace.of(support, torch.Size(event_shape))
    assert space.size == size
    u = torch.randn(5, 2, size, dtype=torch.float64)
    x = space.to_support(u)
    assert x.shape == (5, 2) + event_shape
    torch.testing.assert_close(space.to_unconstrained(x), u, rtol=1e-9, atol=1e-9)
    again, log_det = space.with_log_det(u)
    assert torch.equal(again, x)
    assert log_det.shape == (5, 2)


def free_coordinates(support, x):
    """The coordinates of x that Lebesgue measure on the support refers to."""
    if support is C.simplex:
        return x[:-1]
    if support is C.corr_cholesky:
        rows, columns = torch.tril_indices(3, 3, -1)
        return x[rows, columns]
    if isinstance(support, type(C.cat([C.real]))) and C.simplex in support.cseq:
        return torch.cat([x[:2], x[3:]])
    return x.reshape(-1)


@pytest.mark.parametrize(
    ("support", "event_shape", "size"),
    [s for s in SUPPORTS if s[0] is C.simplex or not isinstance(s[0], C.independent)],
    ids=str,
)
def test_log_determinant_is_that_of_the_jacobian(support, event_shape, size):
    space = UnconstrainedSpace.of(support, torch.Size(event_shape))
    u = torch.randn(size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: free_coordinates(support, space.to_support(v)), u
    )
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(space.with_log_det(u)[1], expected, rtol=1e-10, atol=1e-10)


def test_mixture_of_equal_supports_has_its_components_bijection():
    components = dist.Gamma(torch.ones(2, 3), 1.0).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components)
    for support in (mixture.support, event_support(mixture.support, 1)):
        assert torch.equal(bijection(support, 1)(torch.zeros(3)), torch.ones(3))


def test_mixture_with_bounds_per_component_has_none():
    components = dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0]))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components)
    with pytest.raises(NotImplementedError, match="bounds of their own"):
        bijection(mixture.support, 0)


@pytest.mark.parametrize("support", [spins, C.multinomial(3), C.lower_cholesky, C.sphere], ids=str)
def test_support_without_bijection_is_named(support):
    with pytest.raises(NotImplementedError, match=r"no default sampler for support .*sampler="):
        bijection(support, 2)


def test_event_with_too_few_dims():
    with pytest.raises(ValueError, match="needs events of 1 dims, got 0"):
        bijection(C.simplex, 0)


MIXED = [C.boolean, C.simplex, C.half_open_interval(0.0, 2.0), C.less_than(3.0), C.real]
ENDS = [
    (C.unit_interval, [0.0, 1e-40, 0.5, 1 - 2**-24, 1.0], [0, 4]),
    (C.nonnegative, [1e-40, 0.0], [1]),
    (C.interval(*bounds), [0.5, 7.0], [1]),
    (C.MixtureSameFamilyConstraint(C.unit_interval), [0.0, 0.5], [0]),
    (C.independent(C.simplex, 1), [[0.0, 1.0, 0.0], [0.2, 0.8, 0.0]], [0, 2, 5]),
    (
        C.independent(C.cat(MIXED, -1, [1, 2, 1, 1, 1]), 1),
        [1.0, 1.0, 0.0, 0.0, 3.0, 0.0],
        [2, 3, 4],
    ),
    (C.cat(MIXED, 0, [1, 2, 1, 1, 1]), [0.0, 0.5, 0.5, 2.0, 0.0, -1e9], [3]),
    (C.stack([C.unit_interval, C.real], -1), [1.0, 1.0], [0]),
    (C.independent(C.real, 1), [0.0, -1e9], []),
    (C.integer_interval(0, 2), [0.0, 2.0], []),
    (C.ordered_vector, [0.0, 0.0], []),
]


@pytest.mark.parametrize(("support", "event", "ends"), ENDS, ids=str)
def test_ends_are_told_by_the_values(support, event, ends):
    """And not by coordinates, of which torch clamps some; beside other rows, too."""
    x = torch.tensor(event)
    at_end = torch.zeros(x.numel(), dtype=torch.bool)
    at_end[ends] = True
    found = is_at_end(support, torch.stack([x, x.flip(0), x]), x.dim())
    assert found.dtype == torch.bool
    for row in (0, 2):
        assert torch.equal(found[row].reshape(-1), at_end)
    assert has_ends(support) or not ends
    assert not has_ends(C.cat([C.real, C.boolean], -1, [1, 1]))  # costs nothing


def test_ends_of_a_stack_by_row():
    low = torch.tensor([0.0, 1.0, 2.0])
    support = C.stack([C.interval(low, low + 1.0), C.real], -1)
    x = torch.stack([low + 0.5, low], -1)
    assert not is_at_end(support, x, 1).any()
    x[1, 0] = 1.0
    assert is_at_end(support, x, 1).nonzero().tolist() == [[1, 0]]
