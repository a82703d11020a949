"""Langevin steps at a temperature: their stationary law, their clip, their annealing."""

import math

import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.likelihood.tempered_langevin import TemperedLangevin
from pyro_ebm.mcmc import ULA
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing import assert_mean_close


def run(kernel, q, num_steps=1):
    """Positions after some steps from ``q``, ``(C, D)``, with the seed set after all set-up."""
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, q)
    torch.manual_seed(0)
    for _ in range(num_steps):
        state, _ = kernel.step(potential, state)
    return state.position


def moved(law, q, num_steps=1, **options):
    return run(TemperedLangevin(law, **options), q, num_steps)


def gaussian(a):
    return EnergyDistribution(lambda x: 0.5 * a * x**2, event_shape=())


@pytest.mark.parametrize(("s", "sigma"), [(0.1, 0.2), (0.3, 0.775), (0.3, 0.05)])
def test_stationary_variance(s, sigma):
    """(T / a) / (1 - s a / 2), T = sigma^2 / 2s, from 20 000 chains 60 steps from zero."""
    a = 2.0
    kernel = TemperedLangevin(gaussian(a), gradient_step=s, noise_scale=sigma)
    assert kernel.temperature == pytest.approx(sigma**2 / (2 * s))
    q = moved(gaussian(a), torch.zeros(20_000, 1), 60, gradient_step=s, noise_scale=sigma)
    want = kernel.temperature / a / (1 - 0.5 * s * a)
    assert_mean_close(q.square(), torch.tensor([want]))


def test_at_temperature_one_it_is_unadjusted_langevin():
    law, q = gaussian(1.7), torch.randn(50, 1)
    ours = moved(law, q, 3, gradient_step=0.045, noise_scale=0.3)
    theirs = run(ULA(law, step_size=0.3), q, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradients_are_followed_up_to_the_clip():
    """Slopes 2 and 20 at 1 and 10, clipped at 5: steps of .2 and .5 downhill."""
    q = moved(
        gaussian(2.0),
        torch.tensor([[1.0], [10.0], [-10.0]]),
        gradient_step=0.1,
        noise_scale=1e-12,
        max_gradient=5.0,
    )
    torch.testing.assert_close(q, torch.tensor([[0.8], [9.5], [-9.5]]), rtol=0, atol=1e-9)


def test_noise_is_annealed_geometrically():
    options = {"gradient_step": 0.1, "noise_scale": (1.0, 0.01), "anneal_steps": 5}
    kernel = TemperedLangevin(gaussian(1.0), **options)
    scales = [kernel.noise_scale_at(i) for i in range(7)]
    assert scales == pytest.approx([1.0, 10**-0.5, 0.1, 10**-1.5, 0.01, 0.01, 0.01])
    assert kernel.temperature == pytest.approx(0.01**2 / 0.2)
    flat = EnergyDistribution(lambda x: 0.0 * x, event_shape=())
    q = moved(flat, torch.zeros(20_000, 1), 7, **options)
    assert_mean_close(q.square(), torch.tensor([sum(s**2 for s in scales)]))


def test_annealing_begins_anew_at_every_use():
    options = {"gradient_step": 0.1, "noise_scale": (1.0, 1e-6), "anneal_steps": 2}
    objective = ContrastiveDivergence(2, kernel=lambda law: TemperedLangevin(law, **options))
    x, law = torch.zeros(500), EnergyDistribution(lambda x: 0.0 * x, event_shape=())
    for _ in range(2):
        assert objective.draw(law, x, None).points.std() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("name", ["gradient_step", "noise_scale", "max_gradient"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        TemperedLangevin(gaussian(1.0), **{name: -1.0})
    with pytest.raises(ValueError, match="noise_scale must be positive"):
        TemperedLangevin(gaussian(1.0), noise_scale=(1.0, math.nan))
