"""Silent ways to learn nothing, or something else: each is told in words."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import KALE, NCE, DonskerVaradhan, EnergyDiscrepancy, RankingNCE
from pyro_ebm.poutine import surrogate

ONE_LOG_Z = [NCE, KALE, DonskerVaradhan]
STANDARD = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


def no_guide(*args):
    return None


# --- comparisons that teach nothing


def test_an_energy_that_ignores_x_is_told():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: 0.0 * x, base=STANDARD), obs=x)

    with pytest.warns(SurrogateWarning, match="Does it use x?"):
        NCE().differentiable_loss(model, no_guide, torch.randn(5))


def train(objective, model, data, steps):
    optimizer = pyro.optim.Adam({"lr": 0.1})
    svi = pyro.infer.SVI(model, no_guide, optimizer, objective)
    for _ in range(steps):
        svi.step(data)


def located(base):
    """The unit normal energy at a trained place, on top of a base."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: 0.5 * (x - loc) ** 2, base), obs=x)

    return model


def test_noise_far_from_the_data_is_told():
    objective = NCE(noise=dist.Normal(60.0, 1.0))
    with pytest.warns(SurrogateWarning, match="told apart without error"):
        train(objective, located(STANDARD), torch.randn(50), 140)


def test_noise_that_does_not_cover_the_data_is_told():
    """At the edge of the data and narrow: some are taken for noise, but log Z hangs on its tail."""
    objective = NCE(noise=dist.Normal(2.0, 0.2))
    with pytest.warns(SurrogateWarning, match="noise does not cover the model"):
        train(objective, located(STANDARD), torch.randn(2000), 140)


def test_weights_that_are_worth_few_draws_are_told():
    """Data where the base has no mass: the weights fall on the draw that is nearest to it."""
    data = 9.0 + 0.01 * torch.randn(400)
    with pytest.warns(SurrogateWarning, match="effective sample size of the base draws"):
        train(DonskerVaradhan(), tilted(STANDARD), data, 140)


def tilted(base):
    def model(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: -slope * x, base), obs=x)

    return model


def test_good_comparisons_are_not_told(recwarn):
    train(NCE(), located(STANDARD), 0.3 + torch.randn(50), 140)
    assert not [w for w in recwarn if issubclass(w.category, SurrogateWarning)]


# --- one row at a time


def regression(x, z):
    """One row: the context enters by an argument of its own."""
    ebm = EnergyDistribution(lambda y: 0.5 * y**2 - z * y, base=STANDARD)
    pyro.sample("x", ebm, obs=x)


@pytest.mark.parametrize("make", ONE_LOG_Z)
def test_a_context_is_found_with_one_row_at_a_time(make):
    x, z = torch.tensor(0.3), torch.tensor(1.0)
    with pytest.raises(ValueError, match="row-wise values other than x .argument 1.*one log Z"):
        make().differentiable_loss(regression, no_guide, x, z)


@pytest.mark.parametrize("make", [RankingNCE, EnergyDiscrepancy])
def test_a_context_is_no_matter_without_log_z(make):
    make().differentiable_loss(regression, no_guide, torch.tensor(0.3), torch.tensor(1.0))


@pytest.mark.parametrize("make", ONE_LOG_Z)
def test_one_row_without_a_context_is_fine(make):
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", EnergyDistribution(lambda y: 0.5 * (y - loc) ** 2, base=STANDARD), obs=x)

    make().differentiable_loss(model, no_guide, torch.tensor(0.3))


def test_what_cannot_be_checked_with_one_row_is_told():
    def model(x, z):
        if type(z) is not torch.Tensor:
            raise TypeError("plain tensors only")
        regression(x, z)

    with pytest.warns(SurrogateWarning, match="say conditional=True or False"):
        NCE().differentiable_loss(model, no_guide, torch.tensor(0.3), torch.tensor(1.0))


# --- latents behind one learned log Z


def with_latent(x):
    z = pyro.sample("z", STANDARD)
    ebm = EnergyDistribution(lambda x: 0.1 * (x - z) ** 2, base=STANDARD, conditional=False)
    with pyro.plate("data", len(x)):
        pyro.sample("x", ebm, obs=x)


def point(x):
    pyro.sample("z", dist.Delta(pyro.param("z_map", torch.tensor(0.1))))


@pytest.mark.parametrize("make", [NCE, KALE])
def test_one_learned_log_z_and_a_latent(make):
    model, x = with_latent, torch.randn(5)
    guide = AutoNormal(surrogate(model, make()))
    with pytest.raises(ValueError, match="depends on latent 'z'.*would bend the posterior"):
        make().differentiable_loss(model, guide, x)
    make().differentiable_loss(model, point, x)  # a point estimate is a parameter


@pytest.mark.parametrize("make", [RankingNCE, EnergyDiscrepancy, DonskerVaradhan])
def test_no_learned_log_z_and_a_latent(make):
    model = with_latent
    make().differentiable_loss(model, AutoNormal(surrogate(model, make())), torch.randn(5))


def test_few_base_draws_are_told():
    """The log of a mean of four weights is biased by their relative variance over eight."""
    with pytest.warns(SurrogateWarning, match="4 base draws a step are few"):
        train(DonskerVaradhan(), tilted(STANDARD), 0.1 * torch.randn(4), 140)


def test_a_random_energy_is_not_called_conditional():
    def model(x):
        ebm = EnergyDistribution(lambda y: 0.5 * y**2 * torch.rand_like(y), base=STANDARD)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    with pytest.warns(SurrogateWarning, match="is random .dropout"):
        NCE().differentiable_loss(model, no_guide, torch.randn(5))
