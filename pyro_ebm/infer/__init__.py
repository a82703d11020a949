"""Learning objectives, and posteriors over the parameters of unnormalized models."""

from pyro_ebm.infer.anchored_posterior import anchored_posterior
from pyro_ebm.infer.conditional_nce import ConditionalNCE
from pyro_ebm.infer.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.data_structure import DataStructure, SiteStructure, data_structure
from pyro_ebm.infer.denoising import DenoisingScoreMatching, geometric_levels
from pyro_ebm.infer.discrete_energy_discrepancy import DiscreteEnergyDiscrepancy
from pyro_ebm.infer.discrete_fisher import DiscreteFisher
from pyro_ebm.infer.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.enumerated import Enumerated
from pyro_ebm.infer.fit import fit
from pyro_ebm.infer.fit_result import FitResult
from pyro_ebm.infer.flow_contrastive import FlowContrastive
from pyro_ebm.infer.generalized_bayes import GeneralizedBayes, generalized_posterior
from pyro_ebm.infer.hyvarinen_score import HyvarinenScore, hyvarinen_score
from pyro_ebm.infer.kale import KALE, DonskerVaradhan
from pyro_ebm.infer.kernel_kale import KernelKALE
from pyro_ebm.infer.kernel_stein import KernelStein
from pyro_ebm.infer.minimum_probability_flow import MinimumProbabilityFlow
from pyro_ebm.infer.mmd import MMD
from pyro_ebm.infer.nce import NCE, RankingNCE
from pyro_ebm.infer.nce_posterior import nce_posterior
from pyro_ebm.infer.objective import Objective
from pyro_ebm.infer.particle_flow import ParticleFlow, kale_flow, mmd_flow
from pyro_ebm.infer.per_site import PerSite
from pyro_ebm.infer.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.perturbations import GaussianNoise, MixedColumns
from pyro_ebm.infer.posterior import posterior
from pyro_ebm.infer.posterior_result import Posterior
from pyro_ebm.infer.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.ratio_matching import RatioMatching
from pyro_ebm.infer.recovery_likelihood import RecoveryLikelihood
from pyro_ebm.infer.score_matching import ScoreMatching
from pyro_ebm.infer.self_normalized import SelfNormalized
from pyro_ebm.infer.site_perturbations import BernoulliFlips, HeatKernel, MaskedSite, SiteFlip
from pyro_ebm.infer.sliced import SlicedScoreMatching
from pyro_ebm.infer.telescoping import BridgeEnergy, TelescopingNCE
from pyro_ebm.infer.tempered_langevin import TemperedLangevin
from pyro_ebm.infer.wasserstein import WassersteinCritic
from pyro_ebm.ops.kale_dual import kernel_kale
from pyro_ebm.ops.kernels import GaussianKernel, InverseMultiquadricKernel

__all__ = [
    "GaussianNoise",
    "MixedColumns",
    "kernel_kale",
    "GaussianKernel",
    "InverseMultiquadricKernel",
    "SiteFlip",
    "MaskedSite",
    "HeatKernel",
    "BernoulliFlips",
    "TemperedLangevin",
    "mmd_flow",
    "kale_flow",
    "ParticleFlow",
    "WassersteinCritic",
    "KernelKALE",
    "MMD",
    "FlowContrastive",
    "TelescopingNCE",
    "BridgeEnergy",
    "SlicedScoreMatching",
    "SelfNormalized",
    "RecoveryLikelihood",
    "MinimumProbabilityFlow",
    "DiscreteEnergyDiscrepancy",
    "geometric_levels",
    "DenoisingScoreMatching",
    "PersistentContrastiveDivergence",
    "ContrastiveDivergence",
    "ConditionalNCE",
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
