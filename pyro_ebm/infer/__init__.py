"""Learning objectives, and posteriors over the parameters of unnormalized models."""

from pyro_ebm.infer.anchored_posterior import anchored_posterior
from pyro_ebm.infer.data_structure import DataStructure, SiteStructure, data_structure
from pyro_ebm.infer.discrete_fisher import DiscreteFisher
from pyro_ebm.infer.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.enumerated import Enumerated
from pyro_ebm.infer.fit import FitResult, fit
from pyro_ebm.infer.generalized_bayes import GeneralizedBayes, generalized_posterior
from pyro_ebm.infer.hyvarinen_score import HyvarinenScore, hyvarinen_score
from pyro_ebm.infer.kale import KALE, DonskerVaradhan
from pyro_ebm.infer.kernel_stein import KernelStein
from pyro_ebm.infer.nce import NCE, RankingNCE
from pyro_ebm.infer.nce_posterior import nce_posterior
from pyro_ebm.infer.objective import Objective
from pyro_ebm.infer.per_site import PerSite
from pyro_ebm.infer.posterior import posterior
from pyro_ebm.infer.posterior_result import Posterior
from pyro_ebm.infer.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.ratio_matching import RatioMatching
from pyro_ebm.infer.score_matching import ScoreMatching

__all__ = [
    "anchored_posterior",
    "KALE",
    "NCE",
    "DataStructure",
    "DiscreteFisher",
    "DonskerVaradhan",
    "EnergyDiscrepancy",
    "Enumerated",
    "FitResult",
    "GeneralizedBayes",
    "HyvarinenScore",
    "KernelStein",
    "Objective",
    "PerSite",
    "Posterior",
    "PseudoLikelihood",
    "RankingNCE",
    "RatioMatching",
    "ScoreMatching",
    "SiteStructure",
    "data_structure",
    "fit",
    "generalized_posterior",
    "hyvarinen_score",
    "nce_posterior",
    "posterior",
]
