"""Energies as Pyro distributions, and the guard of their normalizers."""

from pyro_ebm.distributions.energy_distribution import EnergyDistribution
from pyro_ebm.distributions.generalized import GeneralizedEBM
from pyro_ebm.distributions.pushforward import PushforwardDistribution
from pyro_ebm.distributions.sites import energy_factor
from pyro_ebm.distributions.wrappers import unwrap

__all__ = [
    "EnergyDistribution",
    "GeneralizedEBM",
    "PushforwardDistribution",
    "energy_factor",
    "unwrap",
]
