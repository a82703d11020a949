"""Graphs of a potential: faithful, of one batch size, and left where they would not be."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_cases import F64, LOC, SCALE, scaled
from torch.fx import GraphModule

from pyro_ebm import EnergyDistribution
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.targets import captured
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.mcmc.targets.failing_rows import nan_where_it_fails


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(13)


def test_what_branches_on_its_values_is_not_replayed():
    """The graph of the first branch would be wrong on the other."""

    def energy(x):
        return x.square().sum(-1) if bool((x[0] > 0.5).all()) else x.abs().sum(-1)

    target = DistributionTarget(EnergyDistribution(energy, event_shape=(1,)))
    potential = CapturedPotential(target)
    ones, small = torch.full((2, 1), 0.55, dtype=F64), torch.full((2, 1), 0.1, dtype=F64)
    with pytest.warns(UserWarning, match="because it branches on its values"):
        torch.testing.assert_close(potential(ones)[0], ones[:, 0] ** 2)
    torch.testing.assert_close(potential(small)[0], small[:, 0])
    torch.testing.assert_close(potential(small)[1], torch.ones_like(small))


def test_what_reads_its_values_by_numpy_is_not_replayed():
    """Nothing fails while this is recorded: the graph would keep the first values for good."""

    def energy(x):
        return (x - float(x.detach().numpy().max())).square().sum(-1)

    check_left_alone(energy, "because it reads its values by Python or NumPy")


def check_left_alone(energy, why):
    """Different points, signs and numbers of positive entries: all as the energy itself says."""
    potential = CapturedPotential(DistributionTarget(EnergyDistribution(energy, event_shape=(1,))))
    points = [[1.0, 3.0, -2.0], [1.0, 2.0, 0.5], [-1.0, -2.0, -0.5], [-0.1, 2.0, -4.0]]
    rows = [torch.tensor(row, dtype=F64)[:, None] for row in points]
    with pytest.warns(UserWarning, match=why):
        potential(rows[0])
    for q in rows:
        torch.testing.assert_close(potential(q)[0], energy(q))


def halved_above(x):
    out = x.square()
    out[x > 0] = 0.5 * out[x > 0]
    return out.sum(-1)


def summed_above(x):
    return x.square().sum(-1) + x[x > 0].exp().neg().sum() * 0.1


def counted_above(x):
    return x.square().sum(-1) / (1.0 + len(torch.nonzero(x[:, 0] > 0)))


def counted_by_numpy(x):
    return x.square().sum(-1) * int((x.detach().numpy() > 0).sum())


def shifted_far_up(x):
    """Three nats on one side, on top of 1e4: acceptance is by differences."""
    side = torch.as_tensor(x.detach().numpy() > 0).to(x.dtype)
    return (1e4 + x.square() / 2 + 3.0 * side).sum(-1)


@pytest.mark.parametrize("energy", [halved_above, summed_above, counted_above])
def test_shapes_that_depend_on_values_are_not_replayed(energy):
    check_left_alone(energy, "because it branches on its values")


@pytest.mark.parametrize("energy", [counted_by_numpy, shifted_far_up])
def test_signs_and_small_parts_of_large_energies_are_seen(energy):
    check_left_alone(energy, "because it reads its values by Python or NumPy")


def test_graphs_are_of_one_batch_size():
    made = scaled()
    potential = CapturedPotential(DistributionTarget(made.dist))
    for num in (5, 3, 1):
        q = made.sample(num)
        torch.testing.assert_close(potential.energy(q), 0.5 * q.square().sum(1))
        u, gradient = potential(q)
        torch.testing.assert_close(u, potential.value(q))
        torch.testing.assert_close(gradient, q + (q - LOC) / SCALE**2)


def test_a_graph_that_kept_a_value_is_not_faithful():
    q = torch.arange(6.0).reshape(3, 2)
    made = captured.CapturedFunction(
        lambda q: (q.sum(1), 2.0 * q), "it", compile=False, capture=True
    )
    assert made._is_faithful(made.fn, q)
    assert not made._is_faithful(lambda other: (q.sum(1), 2.0 * other), q)
    assert not made._is_faithful(lambda other: (other.sum(1), 2.0 * q), q)


def test_a_graph_recorded_nearer_to_zero_is_that_of_the_points_themselves():
    """At the first chain's point the matrix is not definite, so nothing can be recorded there."""

    def energy(x):
        matrix = (1.5 - x.square()).unsqueeze(-1) * torch.eye(2, dtype=F64)
        return torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)

    potential = CapturedPotential(DistributionTarget(EnergyDistribution(energy, event_shape=(1,))))
    u, gradient = potential(torch.tensor([[2.0], [0.5], [-0.3]], dtype=F64))
    x = torch.tensor([0.5, -0.3], dtype=F64)
    torch.testing.assert_close(u[1:], (1.5 - x.square()).log())
    torch.testing.assert_close(gradient[1:, 0], -2.0 * x / (1.5 - x.square()))
    assert u[0].isnan()


DATA = torch.arange(4.0, dtype=F64)


def numbers_of_data(x):
    scale = int(DATA.sum()) if bool((DATA > 2).any()) else 0
    return scale * x.square().sum(-1)


def masked_data(x):
    return x.square().sum(-1) * DATA[DATA > 1].sum() + x[:, 0] * len(torch.nonzero(DATA))


@pytest.mark.parametrize("number", [1, 5, 16])
def test_rows_that_fail_are_nan_alone(number):
    """Any of them, also all; and without rows that work there is nothing to return."""

    def fn(q):
        inverse = torch.linalg.inv(torch.eye(2, dtype=F64) * q[:, :, None])
        return inverse.sum((1, 2)), inverse.flatten(1)

    for failed in (torch.ones(number).bool(), *(torch.rand(6, number) < 0.4)):
        safe = torch.rand(number, 1, dtype=F64) + 0.5
        q = torch.where(failed[:, None], 0.0, safe + 1.0)
        for found, wanted in zip(nan_where_it_fails(fn, q, safe), fn(safe + 1.0), strict=True):
            assert found[failed].isnan().all()
            assert torch.equal(found[~failed], wanted[~failed])
    with pytest.raises(torch.linalg.LinAlgError):
        nan_where_it_fails(fn, q, torch.zeros_like(q))


def test_positions_that_worked_are_gone_by():
    """Zero is singular as well, and a function without a graph fails as one with it does."""

    def energy(x):
        scale = x[:, :, None] * torch.eye(2, dtype=F64)
        return torch.cholesky_inverse(scale).sum((-2, -1)) * (1.0 if bool(x.sum() > -99.0) else 2.0)

    potential = CapturedPotential(DistributionTarget(EnergyDistribution(energy, event_shape=(1,))))
    good = torch.tensor([[1.0], [2.0], [4.0]], dtype=F64)
    with pytest.warns(UserWarning, match="it branches on its values"):
        potential(good)
    u, grad = potential(torch.where(good == 2.0, 0.0, good))
    torch.testing.assert_close(u, torch.tensor([2.0, torch.nan, 0.125], dtype=F64), equal_nan=True)
    assert grad.isnan()[:, 0].tolist() == [False, True, False]


def correlated(solved, x):
    """Scales and a correlation that the first trajectories take to the ends of the floats."""
    factor = pyro.sample("factor", dist.LKJCholesky(2, torch.tensor(1.5)))
    scales = pyro.sample("scales", dist.Gamma(torch.tensor(2.0), 1.0).expand([2]).to_event(1))
    root = scales[:, None] * factor
    covariance = root @ root.mT
    pyro.factor("x", -0.5 * (x * solved(root, x)).sum() - 10.0 * torch.logdet(covariance))


@pytest.mark.parametrize(
    "solved",
    [
        lambda root, x: torch.linalg.solve(root @ root.mT, x),
        lambda root, x: torch.cholesky_inverse(root) @ x,
    ],
    ids=["solve", "cholesky_inverse"],
)
def test_chains_survive_singular_matrices(solved):
    """Some of the first proposals have one, in the graph or from within an operation of it."""
    mcmc = MCMC(HMC(correlated), 20, 40, num_chains=64, disable_progbar=True)
    mcmc.run(solved, torch.randn(2, 20))
    moved = mcmc.get_samples()["scales"].diff(dim=1) != 0
    assert float(moved.double().mean()) > 0.5


@pytest.mark.parametrize("energy", [numbers_of_data, masked_data])
def test_numbers_and_masks_of_data_are_no_branches(energy):
    """They are the same at every evaluation: no warning, and a graph."""
    potential = CapturedPotential(DistributionTarget(EnergyDistribution(energy, event_shape=(1,))))
    q = torch.tensor([[1.0], [-2.0]], dtype=F64)
    for row in (q, -q):
        torch.testing.assert_close(potential(row)[0], energy(row))
    assert all(isinstance(g, GraphModule) for g in potential._with_grad._graphs.values())


PRIOR = dist.Normal(0.0, 1.0).expand([3]).to_event(1)  # which goes on checking its values


def test_distributions_made_before_the_run_are_no_branches():
    """No warning, in a model and as a base; the user's own goes on checking."""
    target = HMC(lambda: pyro.sample("x", PRIOR)).bind()
    q = torch.randn(4, 3)
    law = EnergyDistribution(lambda x: 0.0 * x.sum(-1), base=PRIOR)
    for potential in (CapturedPotential(target), CapturedPotential(DistributionTarget(law))):
        torch.testing.assert_close(potential(q)[1], q)
        assert all(isinstance(g, GraphModule) for g in potential._with_grad._graphs.values())
    assert PRIOR.base_dist._validate_args
