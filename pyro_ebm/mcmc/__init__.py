"""Kernels and drivers that draw from energies."""

from pyro_ebm.mcmc.recording import RecordingHMC, RecordingNUTS

__all__ = ["RecordingHMC", "RecordingNUTS"]
