"""Kernels and drivers: many chains in one batch, and Pyro's own kernels with statistics."""

from pyro_ebm.mcmc.auxiliary import ExactDraws, Sweeps
from pyro_ebm.mcmc.chees import ChEESHMC
from pyro_ebm.mcmc.direction_exchange import DirectionExchange
from pyro_ebm.mcmc.driver import MCMC
from pyro_ebm.mcmc.each_chain import EachChain
from pyro_ebm.mcmc.elliptical_slice import EllipticalSlice
from pyro_ebm.mcmc.exchange import Exchange
from pyro_ebm.mcmc.exchange_diagnostics import ExchangeDiagnostics, exchange_diagnostics
from pyro_ebm.mcmc.grouped_exchange import GroupedExchange
from pyro_ebm.mcmc.hmc import HMC
from pyro_ebm.mcmc.kernel import Kernel, State
from pyro_ebm.mcmc.kinetic_langevin import KineticLangevin
from pyro_ebm.mcmc.mala import MALA
from pyro_ebm.mcmc.nuts import NUTS
from pyro_ebm.mcmc.pcn import PCN
from pyro_ebm.mcmc.pcnl import PCNL
from pyro_ebm.mcmc.pyro_kernel import PyroKernel
from pyro_ebm.mcmc.random_walk import RandomWalk
from pyro_ebm.mcmc.recording import RecordingHMC, RecordingNUTS
from pyro_ebm.mcmc.replay_buffer import ReplayBuffer
from pyro_ebm.mcmc.resampled import Resampled
from pyro_ebm.mcmc.sample import sample
from pyro_ebm.mcmc.smc import SMC, SMCPlan
from pyro_ebm.mcmc.surrogate_exchange import SurrogateExchange
from pyro_ebm.mcmc.tempering import ParallelTempering
from pyro_ebm.mcmc.ula import ULA

__all__ = [
    "Resampled",
    "HMC",
    "MALA",
    "MCMC",
    "NUTS",
    "PCN",
    "PCNL",
    "SMC",
    "ULA",
    "ChEESHMC",
    "DirectionExchange",
    "EachChain",
    "EllipticalSlice",
    "ExactDraws",
    "Exchange",
    "ExchangeDiagnostics",
    "GroupedExchange",
    "Kernel",
    "KineticLangevin",
    "ParallelTempering",
    "PyroKernel",
    "RandomWalk",
    "RecordingHMC",
    "RecordingNUTS",
    "ReplayBuffer",
    "SMCPlan",
    "State",
    "SurrogateExchange",
    "Sweeps",
    "exchange_diagnostics",
    "sample",
]
