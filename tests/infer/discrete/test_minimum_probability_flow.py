"""Minimum probability flow against sums over all states and all neighbours."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import ConwayMaxwellPoisson
from pyro_ebm.infer.discrete.minimum_probability_flow import MinimumProbabilityFlow
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.discrete.ratio_matching import RatioMatching
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.ops.constraints import spins
from pyro_ebm.poutine import surrogate

ALL = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
PAIRS = list(itertools.combinations(range(4), 2))


def boltzmann(theta):
    """Four spins with six couplings and four fields."""

    def energy(x):
        pairs = torch.stack([x[..., i] * x[..., j] for i, j in PAIRS], -1)
        return -(theta * torch.cat([pairs, x], -1)).sum(-1)

    return EnergyDistribution(energy, event_shape=(4,), support=spins)


def truth():
    torch.manual_seed(0)
    return 0.5 * torch.randn(10)


def population(theta, at):
    weights = torch.softmax(-boltzmann(at).energy(ALL), 0)
    return (weights * MinimumProbabilityFlow().row_losses(boltzmann(theta), ALL)).sum()


# --- at the population


def test_gradient_is_zero_at_the_truth():
    """To rounding, under the exact law of sixteen states; it is a minimum, and not flat."""
    at = truth()
    slope = torch.autograd.functional.jacobian(lambda t: population(t, at), at)
    curvature = torch.autograd.functional.hessian(lambda t: population(t, at), at)
    assert slope.abs().max() < 1e-12
    assert torch.linalg.eigvalsh(curvature).min() > 0.1
    elsewhere = torch.autograd.functional.jacobian(lambda t: population(t, at), at + 0.1)
    assert elsewhere.abs().max() > 0.05


def test_minimum_is_the_overlap_of_neighbours():
    """At the truth the flow is the sum over ordered pairs of neighbours of sqrt(p(x) p(x'))."""
    at = truth()
    p = torch.softmax(-boltzmann(at).energy(ALL), 0)
    apart = (ALL[:, None] != ALL[None]).sum(-1)
    want = torch.where(apart == 1, (p[:, None] * p[None]).sqrt(), 0.0).sum()
    torch.testing.assert_close(population(at, at), want, rtol=0, atol=1e-12)


def test_relatives_are_losses_of_the_same_odds():
    """The square root of the odds, the log of one plus them, the square of their share."""
    p = boltzmann(truth())
    flips = torch.stack([ALL * (1 - 2 * torch.eye(4)[j]) for j in range(4)])
    odds = (p.energy(ALL) - p.energy(flips)).exp()
    assert_close = torch.testing.assert_close
    assert_close(MinimumProbabilityFlow().row_losses(p, ALL), odds.sqrt().sum(0))
    assert_close(PseudoLikelihood().row_losses(p, ALL), (1 + odds).log().sum(0))
    assert_close(RatioMatching().row_losses(p, ALL), ((odds / (1 + odds)) ** 2).sum(0))


def test_estimate_is_the_truth():
    """One Newton step from it on 20 000 draws: within four standard errors, none above 0.03."""
    at, num = truth(), 20_000
    torch.manual_seed(1)
    weights = torch.softmax(-boltzmann(at).energy(ALL), 0)
    counts = torch.multinomial(weights, num, replacement=True).bincount(minlength=16)
    slopes = torch.autograd.functional.jacobian(
        lambda t: MinimumProbabilityFlow().row_losses(boltzmann(t), ALL), at
    )
    curvature = torch.autograd.functional.hessian(lambda t: population(t, at), at)
    influence = -slopes @ torch.linalg.inv(curvature)
    step = (counts[:, None] * influence).sum(0) / num
    stderr = ((weights[:, None] * influence**2).sum(0) / num).sqrt()
    assert (step / stderr).abs().max() < 4
    assert stderr.max() < 0.03


# --- neighbourhoods by hand


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_all_other_categories_are_neighbours(dtype):
    table = torch.randn(3, 3)
    support = constraints.integer_interval(0, 2)
    p = EnergyDistribution(
        lambda x: -table[x[..., 0].long(), x[..., 1].long()], event_shape=(2,), support=support
    )
    x = torch.tensor(list(itertools.product(range(3), repeat=2)), dtype=dtype)
    roots = (0.5 * table).exp()
    want = (roots.sum(0, keepdim=True) + roots.sum(1, keepdim=True)) / roots - 2
    found = MinimumProbabilityFlow().row_losses(p, x)
    torch.testing.assert_close(found, want.flatten(), rtol=0, atol=1e-10)


def test_counts_have_one_neighbour_at_zero():
    """p(x - 1) / p(x) = x^nu / rate and p(x + 1) / p(x) = rate / (x + 1)^nu."""
    rate, nu = torch.tensor(2.3), torch.tensor(1.4)
    p = EnergyDistribution(ConwayMaxwellPoisson(rate.log(), nu))
    x = torch.arange(6.0)
    want = (x**nu / rate).sqrt() + (rate / (x + 1) ** nu).sqrt()
    torch.testing.assert_close(MinimumProbabilityFlow().row_losses(p, x), want, rtol=0, atol=1e-10)


def test_gradient_of_counts_is_zero_at_the_truth():
    """Two parameters, the law summed up to 60 counts."""
    x = torch.arange(60.0)
    at = torch.tensor([0.8, 1.4])
    weights = torch.softmax(-EnergyDistribution(ConwayMaxwellPoisson(*at)).energy(x), 0)

    def of(theta):
        p = EnergyDistribution(ConwayMaxwellPoisson(*theta))
        return (weights * MinimumProbabilityFlow().row_losses(p, x)).sum()

    slope = torch.autograd.functional.jacobian(of, at)
    assert slope.abs().max() < 1e-10
    assert torch.autograd.functional.jacobian(of, at + 0.1).abs().max() > 1e-3


# --- neighbours that are data


def by_loop(p, x, rows):
    """For every row the neighbours that are none of ``rows``, one at a time."""
    data = {tuple(row.tolist()) for row in rows}
    losses = []
    for row in x:
        flips = [row * (1 - 2 * torch.eye(4)[j]) for j in range(4)]
        away = [y for y in flips if tuple(y.tolist()) not in data]
        losses.append(
            sum(((0.5 * (p.energy(row) - p.energy(y))).exp() for y in away), 0.0 * row[0])
        )
    return torch.stack(losses)


def test_neighbours_that_are_data_are_left_out():
    p, x = boltzmann(truth()), ALL[[0, 1, 3, 3, 8, 12]]
    found = MinimumProbabilityFlow(exclude_data=True).row_losses(p, x)
    torch.testing.assert_close(found, by_loop(p, x, x), rtol=0, atol=1e-10)
    assert (MinimumProbabilityFlow().row_losses(p, x) - found).max() > 0.1
    nested = MinimumProbabilityFlow(exclude_data=True).row_losses(p, x.reshape(2, 3, 4))
    torch.testing.assert_close(nested.flatten(), found)


def test_nothing_flows_where_all_states_are_data():
    p = boltzmann(truth())
    assert (MinimumProbabilityFlow(exclude_data=True).row_losses(p, ALL) == 0).all()


def test_masked_rows_are_no_data():
    p, x = boltzmann(truth()), ALL[[0, 1, 3, 8]]
    mask = torch.tensor([True, False, True, True])

    def model(x):
        with pyro.plate("data", 4), poutine.mask(mask=mask):
            pyro.sample("x", p, obs=x)

    objective = MinimumProbabilityFlow(exclude_data=True)
    loss = objective.differentiable_loss(model, lambda x: None, x)
    want = by_loop(p, x[mask], x[mask]).sum()
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)
    bare = objective.row_losses(p, x, mask)[mask].sum()
    torch.testing.assert_close(bare, want, rtol=0, atol=1e-10)
    assert (want - by_loop(p, x[mask], x).sum()).abs() > 0.1


def test_a_chain_leaves_data_out_too():
    """In one batch, as a graph: warnings are errors."""

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", boltzmann(theta), obs=x)

    target = surrogate(model, MinimumProbabilityFlow(exclude_data=True))
    kernel = HMC(target, step_size=0.05, trajectory_length=0.1, adapt_step_size=False)
    mcmc = MCMC(kernel, 2, 0, num_chains=3, disable_progbar=True)
    mcmc.run(ALL[[0, 1, 3, 8]], initial_params={"theta": torch.zeros(3, 10)})
    assert mcmc.target.is_vectorized


# --- cost, diagnostics, refusals


def test_one_call_of_the_energy():
    calls = []

    def energy(x):
        calls.append(x.shape)
        return -0.3 * (x * x.roll(1, -1)).sum(-1)

    p = EnergyDistribution(energy, event_shape=(4,), support=spins)
    MinimumProbabilityFlow().row_losses(p, ALL)
    assert calls == [(5, 16, 4)]


def test_diagnostics_name_the_largest_ratio():
    p, objective = boltzmann(truth()), MinimumProbabilityFlow()

    def model(x):
        with pyro.plate("data", 16):
            pyro.sample("x", p, obs=x)

    objective.differentiable_loss(model, lambda x: None, ALL)
    flips = torch.stack([ALL * (1 - 2 * torch.eye(4)[j]) for j in range(4)])
    want = (p.energy(ALL) - p.energy(flips)).max()
    torch.testing.assert_close(objective.diagnostics["x"]["largest_log_ratio"], want)


def test_continuous_supports_are_refused():
    p = EnergyDistribution(lambda x: x**2, event_shape=())
    with pytest.raises(NotImplementedError, match="MinimumProbabilityFlow .*ScoreMatching"):
        MinimumProbabilityFlow().row_losses(p, torch.randn(3))
