"""Models, kernels and planted bugs that calibration tests share."""

import pyro
import pyro.distributions as dist
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily, Ising
from pyro_ebm.mcmc import Exchange

NUM_ROWS = 5


class Precision(ExponentialFamily):
    """N(0, 1 / precision) without its log Z."""

    coefficients = ("precision",)
    is_sampleable = True

    def __init__(self, precision):
        super().__init__((), dist.constraints.real)
        self._set("precision", precision)

    def statistics(self, x):
        return -0.5 * x.square().unsqueeze(-1)

    def sample(self, shape=()):
        shape = torch.Size(shape) + self.precision.shape
        return torch.randn(shape, dtype=self.precision.dtype) / self.precision.sqrt()


class Centre(ExponentialFamily):
    """N(mean, 1) without its log Z, moved by a kernel that raises at NaN."""

    coefficients = ("mean",)

    def __init__(self, mean):
        super().__init__((), dist.constraints.real)
        self._set("mean", mean)

    def statistics(self, x):
        return torch.stack([x, -0.5 * x.square()], -1)

    def natural(self):
        return torch.stack([self.mean, torch.ones_like(self.mean)], -1)

    def set_natural(self, natural):
        self.mean = natural[..., 0]

    def sweep(self, x, num_sweeps):
        if bool(x.isnan().any()):
            raise ValueError("NaN has no neighbours")
        kept = 0.1**num_sweeps
        return self.mean + kept * (x - self.mean) + (1.0 - kept**2) ** 0.5 * torch.randn_like(x)


class Lattice(Ising):
    """A lattice that keeps its log Z to itself."""

    is_tractable = False


def conjugate():
    """Five rows of N(m, 1) under N(0, 1)."""
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Normal(m, 1.0))


def mixture(share=0.4):
    """Rows of N(m, 1), of which a share lies higher by 3."""
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("rows", NUM_ROWS):
        high = pyro.sample("high", dist.Bernoulli(torch.tensor(share)))
        pyro.sample("x", dist.Normal(m + 3.0 * high, 1.0))


def precisions():
    """Rows of N(0, 1 / precision); a log-normal prior, which vmap draws."""
    precision = pyro.sample("precision", dist.LogNormal(torch.tensor(0.5), 0.7))
    with pyro.plate("rows", NUM_ROWS):
        pyro.sample("x", EnergyDistribution(Precision(precision)))


def lattice(shape=(3, 3)):
    coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
    pyro.sample("x", EnergyDistribution(Lattice(coupling, shape)))


def log_likelihood_of_lattice(parameters, data):
    """With the log Z that the lattice does not tell."""
    law = Ising(parameters["coupling"], data["x"].shape[-2:])
    return -law(data["x"]) - law.log_normalizer()


class WithoutJacobian(Exchange):
    """Forgets that its potential is one of the unconstrained coordinates."""

    def log_accept(self, potential, state, to):
        def log_volume(state):
            (way,) = potential.target._transforms.values()
            u = state.position[:, 0]
            return -way.log_abs_det_jacobian(way.inv(u), u)

        missing = log_volume(state) - log_volume(to)
        return super().log_accept(potential, state, to) + missing


class OneDrawForAll(Exchange):
    """Counts one auxiliary row as often as there are rows."""

    def log_ratios(self, *args):
        ratios = super().log_ratios(*args)
        return ratios[:, :1].expand_as(ratios)


class WrongSign(Exchange):
    """Adds what it should take off."""

    def log_ratios(self, *args):
        return -super().log_ratios(*args)


BUGS = [WithoutJacobian, OneDrawForAll, WrongSign]
