"""Learning objectives: NCE, KALE, energy discrepancy and what they share."""

from pyro_ebm.infer.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.fit import FitResult, fit
from pyro_ebm.infer.kale import KALE, DonskerVaradhan
from pyro_ebm.infer.nce import NCE, RankingNCE
from pyro_ebm.infer.objective import Objective
from pyro_ebm.infer.per_site import PerSite

__all__ = [
    "KALE",
    "NCE",
    "DonskerVaradhan",
    "EnergyDiscrepancy",
    "FitResult",
    "Objective",
    "PerSite",
    "RankingNCE",
    "fit",
]
