"""Draws of any sampler: one record, ArviZ objects, and diagnostics."""

from pyro_ebm.chains.arviz import summary, to_arviz
from pyro_ebm.chains.diagnostics import Diagnosis, bfmi, diagnose
from pyro_ebm.chains.record import Record, as_record
from pyro_ebm.chains.runaway import find_runaways
from pyro_ebm.chains.two_sample import (
    MMDInterval,
    median_distance,
    mmd2,
    mmd2_bootstrap,
    mmd2_difference,
)

__all__ = [
    "Diagnosis",
    "MMDInterval",
    "Record",
    "as_record",
    "bfmi",
    "diagnose",
    "find_runaways",
    "median_distance",
    "mmd2",
    "mmd2_bootstrap",
    "mmd2_difference",
    "summary",
    "to_arviz",
]
