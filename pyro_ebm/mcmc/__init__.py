"""Kernels and drivers: many chains in one batch, and Pyro's own kernels with statistics."""

from pyro_ebm.mcmc.exchange.auxiliary import ExactDraws, Sweeps
from pyro_ebm.mcmc.exchange.direction_exchange import DirectionExchange
from pyro_ebm.mcmc.exchange.exchange import Exchange
from pyro_ebm.mcmc.exchange.exchange_diagnostics import ExchangeDiagnostics, exchange_diagnostics
from pyro_ebm.mcmc.exchange.grouped_exchange import GroupedExchange
from pyro_ebm.mcmc.exchange.resampled import Resampled
from pyro_ebm.mcmc.exchange.surrogate_exchange import SurrogateExchange
from pyro_ebm.mcmc.kernels.chees import ChEESHMC
from pyro_ebm.mcmc.kernels.elliptical_slice import EllipticalSlice
from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.kernels.kernel import Kernel, State
from pyro_ebm.mcmc.kernels.kinetic_langevin import KineticLangevin
from pyro_ebm.mcmc.kernels.mala import MALA
from pyro_ebm.mcmc.kernels.nuts import NUTS
from pyro_ebm.mcmc.kernels.pcn import PCN
from pyro_ebm.mcmc.kernels.pcnl import PCNL
from pyro_ebm.mcmc.kernels.pyro_kernel import PyroKernel
from pyro_ebm.mcmc.kernels.random_walk import RandomWalk
from pyro_ebm.mcmc.kernels.tempering import ParallelTempering
from pyro_ebm.mcmc.kernels.ula import ULA
from pyro_ebm.mcmc.runs.driver import MCMC
from pyro_ebm.mcmc.runs.recording import RecordingHMC, RecordingNUTS
from pyro_ebm.mcmc.runs.replay_buffer import ReplayBuffer
from pyro_ebm.mcmc.runs.sample import sample
from pyro_ebm.mcmc.runs.smc import SMC, SMCPlan
from pyro_ebm.mcmc.targets.each_chain import EachChain

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
