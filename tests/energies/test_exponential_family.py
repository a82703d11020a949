"""Families in other parameters than the natural ones: the way back, and that it is asked for."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily, Ising
from pyro_ebm.mcmc import MCMC, Exchange


class Scale(ExponentialFamily):
    """N(0, sigma^2) by its standard deviation."""

    coefficients = ("sigma",)
    is_sampleable = True

    def __init__(self, sigma):
        super().__init__((), constraints.real)
        self._set("sigma", sigma, positive=True)

    def statistics(self, x):
        return -0.5 * x.square().unsqueeze(-1)

    def natural(self):
        return self.sigma.pow(-2).unsqueeze(-1)

    def sample(self, shape=()):
        return self.sigma * torch.randn(tuple(shape) + self.sigma.shape)


class WithWayBack(Scale):
    def set_natural(self, natural):
        self.sigma = natural[..., 0].pow(-0.5)

    sample = Scale.sample


class Vector(ExponentialFamily):
    """A Gaussian by the vector of its natural parameters."""

    coefficients = ("theta",)

    def __init__(self, theta):
        super().__init__((), constraints.real)
        self._set("theta", theta)

    def statistics(self, x):
        return torch.stack([x, -0.5 * x.square()], -1)

    def natural(self):
        return self.theta


class Vectors(Vector):
    def set_natural(self, natural):
        self.theta = natural


class Twice(Ising):
    def natural(self):
        return 2 * super().natural()


class Plain(ExponentialFamily):
    """Keeps its argument as an attribute of no kind."""

    coefficients = ("rate",)

    def __init__(self, rate):
        super().__init__((), constraints.real)
        self.rate = rate

    def statistics(self, x):
        return -x.unsqueeze(-1)


LOST = {
    "a transform": Scale(torch.tensor(0.5)),
    "a vector": Vector(torch.tensor([0.3, 2.0])),
    "one number of two": Vector(torch.tensor([0.3])),
    "a multiple": Twice(0.3, (3, 3)),
}


@pytest.mark.parametrize("case", LOST)
def test_families_without_a_way_back_say_so(case):
    family = LOST[case]
    natural = family.natural().expand(5, -1) + 0.1
    sentence = rf"with_natural\(\) of {type(family).__name__} does not .* define set_natural"
    with pytest.raises(ValueError, match=sentence):
        family.with_natural(natural)


@pytest.mark.parametrize(
    "family",
    [
        WithWayBack(torch.tensor(0.5)),
        WithWayBack(0.5),
        WithWayBack(nn.Parameter(torch.tensor(0.5))),
        Vectors(torch.tensor([0.3, 2.0])),
        Plain(torch.tensor(0.5)),
    ],
)
def test_the_way_back_leads_there_and_leaves_the_first_alone(family):
    first = family.natural()
    natural = first + torch.tensor([[0.5], [1.0]])
    other = family.with_natural(natural)
    torch.testing.assert_close(other.natural(), natural)
    assert torch.equal(family.natural(), first)
    assert not list(other.parameters())
    x = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(other(x), -(family.statistics(x) * natural).sum(-1))


def test_what_is_not_finite_is_not_compared():
    """Jumps may end where a family has no law: they are refused there, by their energies."""
    natural = torch.tensor([[4.0], [-1.0], [torch.nan], [torch.inf]])
    sigma = WithWayBack(0.5).with_natural(natural).sigma
    torch.testing.assert_close(
        sigma, torch.tensor([0.5, torch.nan, torch.nan, 0.0]), equal_nan=True
    )


def test_under_vmap_nothing_is_compared():
    def energy(natural):
        return WithWayBack(0.5).with_natural(natural)(torch.tensor(2.0))

    natural = torch.tensor([[1.0], [2.0]])
    torch.testing.assert_close(torch.func.vmap(energy)(natural), torch.tensor([2.0, 4.0]))


def test_exchange_does_not_go_on_without():
    """It would end at a posterior of something else, with every chain mixing."""

    def model(x):
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(Scale(sigma)), obs=x)

    torch.manual_seed(0)
    mcmc = MCMC(Exchange(model), 2, 2, num_chains=4, disable_progbar=True)
    with pytest.raises(ValueError, match="of Scale does not lead to the natural parameters"):
        mcmc.run(torch.randn(5))
