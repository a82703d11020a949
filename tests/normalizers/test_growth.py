"""Improper energies in many dims are named at once, and proper ones with heavy tails are not."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC
from pyro_ebm.normalizers import estimate_log_normalizer
from pyro_ebm.normalizers.growth import SCALE_UNKNOWN, check_grows, stays_flat


def law(energy, dim, **options):
    return EnergyDistribution(energy, event_shape=(dim,), **options)


IMPROPER = {
    "flat": law(lambda x: 0 * x.sum(-1), 5),
    "linear": law(lambda x: x.sum(-1), 5),
    "falls": law(lambda x: -x.square().sum(-1), 1),
    "one coordinate is free": law(lambda x: x[..., 1:].square().sum(-1), 5),
    "ridge": law(lambda x: 0.5 * (x[..., :-1] - x[..., 1:]).square()[..., 0] + x[..., 2] ** 2, 3),
    "r to the minus d": law(lambda x: 2.0 * torch.log1p(x.square().sum(-1)), 4),
    "one of a batch": EnergyDistribution(
        lambda x: torch.tensor([1.0, 0.0]) * x.square().sum(-1), event_shape=(4,), batch_shape=(2,)
    ),
}

PROPER = {
    "gaussian": law(lambda x: 0.5 * ((x - 900.0) / 1e4).square().sum(-1), 5),
    "t with two degrees": law(lambda x: 3.0 * torch.log1p(x.square().sum(-1)), 4),
    "independent Cauchys": law(lambda x: torch.log1p(x.square()).sum(-1), 8),
    "overflows": law(lambda x: x.pow(6).sum(-1), 4),
    "correlated": law(lambda x: 0.5 * (100 * (x[..., 0] - x[..., 1]) ** 2 + x[..., 0] ** 2), 2),
    "many dims": law(lambda x: x.abs().sum(-1), 300),
}


def funnel(x):
    """Neal's: v of variance 9, the others of variance exp(v)."""
    v, rest = x[..., 0], x[..., 1:]
    return v**2 / 18 + 0.5 * rest.square().sum(-1) * torch.exp(-v) + 0.5 * rest.shape[-1] * v


def rosenbrock(x, steepness=100.0, temperature=1.0):
    bends = steepness * (x[..., 1:] - x[..., :-1] ** 2) ** 2
    return ((1 - x[..., :-1]) ** 2 + bends).sum(-1) / temperature


BENT = {
    "funnel in 2-d": law(funnel, 2),
    "funnel in 5-d": law(funnel, 5),
    "funnel in 10-d": law(funnel, 10),
    "rosenbrock": law(rosenbrock, 2),
    "rosenbrock at 20": law(lambda x: rosenbrock(x, temperature=20.0), 2),
    "rosenbrock in 5-d": law(lambda x: rosenbrock(x, steepness=5.0), 5),
}


@pytest.mark.parametrize("name", IMPROPER)
def test_energies_without_z(name):
    with pytest.raises(NonFiniteEnergyError, match="is the energy proper?"):
        check_grows(IMPROPER[name])


@pytest.mark.parametrize("name", PROPER)
def test_energies_with_z(name):
    check_grows(PROPER[name])


@pytest.mark.parametrize("scale", [1.0, SCALE_UNKNOWN])
@pytest.mark.parametrize("name", BENT)
def test_bent_valleys_have_z(name, scale):
    """Were a seed in ten called flat, thirty would pass in 4 of 100 cases."""
    for seed in range(30):
        torch.manual_seed(seed)
        assert not stays_flat(BENT[name], torch.full((), scale))


@pytest.mark.parametrize("name", IMPROPER)
def test_energies_without_z_are_found_by_all_seeds(name):
    for seed in range(30):
        torch.manual_seed(seed)
        assert stays_flat(IMPROPER[name], torch.full((), SCALE_UNKNOWN))


def test_a_plateau_far_above_the_centre_is_flat():
    plateau = law(lambda x: 50.0 * torch.tanh(x.square().sum(-1)), 2)
    assert stays_flat(plateau, torch.ones(2))


def test_estimates_through_chains_say_that_they_diverge():
    torch.manual_seed(0)
    found = estimate_log_normalizer(BENT["rosenbrock"])
    assert any("trajectories diverge" in doubt for doubt in found.doubts)


def test_no_chains_are_run_for_an_improper_energy(monkeypatch):
    monkeypatch.setattr(HMC, "__init__", lambda self, dist: pytest.fail("chains are run"))
    with pytest.raises(NonFiniteEnergyError, match="is the energy proper?"):
        estimate_log_normalizer(IMPROPER["flat"])


def test_nothing_is_asked_of_a_tilt_or_of_a_half_line():
    check_grows(
        EnergyDistribution(lambda x: 0 * x.sum(-1), dist.Normal(torch.zeros(5), 1.0).to_event(1))
    )
    check_grows(EnergyDistribution(lambda x: 0 * x, support=dist.constraints.positive))


def test_no_random_numbers_are_used():
    torch.manual_seed(3)
    first = torch.randn(1)
    torch.manual_seed(3)
    check_grows(PROPER["gaussian"])
    assert torch.equal(torch.randn(1), first)
