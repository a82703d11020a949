"""The short way to draws: shapes, agreement with the exact law, and its warning."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_ebm as ebm
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.mcmc import HMC, MALA, ULA, sample
from pyro_ebm.testing import PROBLEMS, assert_mean_close


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(9)


@pytest.mark.parametrize("name", ["gaussian", "gamma", "dirichlet"])
def test_draws_are_those_of_the_law(name):
    made = PROBLEMS[name]()
    x = sample(made.dist, (4000,), num_steps=60, warmup_steps=150)
    assert_mean_close(x, made.mean)
    assert_mean_close((x.double() - made.mean) ** 2, made.variance)


@pytest.mark.parametrize("shape", [(), (5,), (3, 40)])
def test_shapes_with_a_batch(shape):
    loc = torch.tensor([[0.0], [10.0]])
    law = ebm.EnergyDistribution(
        lambda x: 0.5 * ((x - loc) ** 2).sum(-1), event_shape=(3,), batch_shape=(2,)
    )
    x = sample(law, shape, warmup_steps=150)
    assert x.shape == (*shape, 2, 3)
    assert (x[..., 1, :] - 10.0).abs().max() < 6.0


def test_as_the_sampler_of_a_distribution_in_a_model():
    made = PROBLEMS["tilted gaussian"]().dist
    law = ebm.EnergyDistribution(
        made.energy_function, made.base, sampler=partial(sample, kernel=HMC)
    )
    draws = pyro.infer.Predictive(
        lambda: pyro.sample("x", law.expand([30]).to_event(1)), num_samples=1
    )()["x"]
    assert_mean_close(draws.reshape(30, 3), 0.5)
    assert not draws.requires_grad


def test_a_generalized_ebm_is_drawn_in_its_latent_space():
    made = PROBLEMS["linear gebm"]()
    x = sample(made.dist, (2000,), num_steps=60, warmup_steps=100)
    z = made.sample(200_000)
    assert_mean_close(x, made.dist.generator(z).mean(0))


def test_chains_that_disagree_are_told():
    law = ebm.EnergyDistribution(lambda x: 50.0 * (x**2 - 4.0) ** 2, base=dist.Normal(0.0, 2.0))
    with pytest.warns(ApproximateSampleWarning, match="do not agree"):
        sample(law, (64,), kernel=MALA, num_steps=20, warmup_steps=20)


def test_what_is_not_the_law_itself_is_told():
    made = PROBLEMS["tilted gaussian"]().dist
    with pytest.raises(ValueError, match=r"give it dist.temper\(beta\)"):
        sample(made, (4,), kernel=partial(HMC, inverse_temperature=3.0))
    with pytest.warns(ApproximateSampleWarning, match="ULA has no accept step"):
        sample(made, (64,), kernel=partial(ULA, step_size=0.5), num_steps=300)
