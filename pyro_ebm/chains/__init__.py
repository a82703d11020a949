"""Draws of any sampler: one record, ArviZ objects, and diagnostics."""

from pyro_ebm.chains.arviz import summary, to_arviz
from pyro_ebm.chains.diagnostics import Diagnosis, bfmi, diagnose
from pyro_ebm.chains.record import Record, as_record
from pyro_ebm.chains.runaway import find_runaways

__all__ = [
    "Diagnosis",
    "Record",
    "as_record",
    "bfmi",
    "diagnose",
    "find_runaways",
    "summary",
    "to_arviz",
]
