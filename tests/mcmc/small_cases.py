"""Small laws and kernels that several files of tests move."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.mcmc import (
    HMC,
    MALA,
    NUTS,
    PCN,
    PCNL,
    ULA,
    ChEESHMC,
    EllipticalSlice,
    KineticLangevin,
    ParallelTempering,
    RandomWalk,
)
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing.problems import Problem

F64 = torch.float64

LOC, SCALE = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([0.5, 3.0], dtype=F64)


def scaled(beta=1.0):
    """N(LOC, SCALE^2) tilted by ``|x|^2 / 2``: precisions add up."""
    law = EnergyDistribution(
        lambda x: 0.5 * x.square().sum(-1),
        dist.Normal(LOC, SCALE).to_event(1),
    ).temper(beta)
    variance = 1.0 / (SCALE**-2 + beta)
    mean = variance * LOC / SCALE**2
    return Problem(
        "scaled",
        law,
        lambda n: mean + variance.sqrt() * torch.randn(n, 2, dtype=F64),
        mean,
        variance,
        0.0,
    )


def several(y):
    a = pyro.sample("a", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    c = pyro.sample("c", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Normal(b @ a, c).to_event(1), obs=y)


KERNELS = {
    "hmc": lambda d: HMC(d, step_size=0.9),
    "chees": lambda d: ChEESHMC(d, step_size=0.9),
    "mala": lambda d: MALA(d, step_size=0.9),
    "nuts": lambda d: NUTS(d, step_size=0.9),
    "random walk": lambda d: RandomWalk(d, step_size=0.9),
    "ula": lambda d: ULA(d, step_size=0.3),
    "baoab": lambda d: KineticLangevin(d, step_size=0.3),
    "obabo": lambda d: KineticLangevin(d, step_size=0.3, scheme="OBABO"),
    "pcn": lambda d: PCN(d, step_size=0.7),
    "pcnl": lambda d: PCNL(d, step_size=0.5),
    "slice": EllipticalSlice,
    "tempering": lambda d: ParallelTempering(d, num_replicas=3),
}


WITH_PRIOR = ["pcn", "pcnl", "slice"]


def started(kernel, made, num_chains=400):
    potential = CapturedPotential(kernel.bind(), capture=False)
    return potential, kernel.init(potential, made.sample(num_chains))
