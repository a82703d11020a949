"""Learning objectives, and posteriors over the parameters of unnormalized models."""

from pyro_ebm.infer.bayes.anchored_posterior import anchored_posterior
from pyro_ebm.infer.bayes.data_structure import DataStructure, SiteStructure, data_structure
from pyro_ebm.infer.bayes.enumerated import Enumerated
from pyro_ebm.infer.bayes.generalized_bayes import GeneralizedBayes, generalized_posterior
from pyro_ebm.infer.bayes.hyvarinen_score import HyvarinenScore, hyvarinen_score
from pyro_ebm.infer.bayes.nce_posterior import nce_posterior
from pyro_ebm.infer.bayes.posterior import posterior
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.infer.discrepancy.discrete_energy_discrepancy import DiscreteEnergyDiscrepancy
from pyro_ebm.infer.discrepancy.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.discrepancy.perturbations import GaussianNoise, MixedColumns
from pyro_ebm.infer.discrepancy.site_perturbations import (
    BernoulliFlips,
    HeatKernel,
    MaskedSite,
    SiteFlip,
)
from pyro_ebm.infer.discrete.discrete_fisher import DiscreteFisher
from pyro_ebm.infer.discrete.minimum_probability_flow import MinimumProbabilityFlow
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.discrete.ratio_matching import RatioMatching
from pyro_ebm.infer.divergences.kale import KALE, DonskerVaradhan
from pyro_ebm.infer.divergences.kernel_kale import KernelKALE
from pyro_ebm.infer.divergences.mmd import MMD
from pyro_ebm.infer.divergences.particle_flow import ParticleFlow, kale_flow, mmd_flow
from pyro_ebm.infer.divergences.self_normalized import SelfNormalized
from pyro_ebm.infer.divergences.wasserstein import WassersteinCritic
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.likelihood.tempered_langevin import TemperedLangevin
from pyro_ebm.infer.noise.conditional_nce import ConditionalNCE
from pyro_ebm.infer.noise.flow_contrastive import FlowContrastive
from pyro_ebm.infer.noise.nce import NCE, RankingNCE
from pyro_ebm.infer.noise.telescoping import BridgeEnergy, TelescopingNCE
from pyro_ebm.infer.score.denoising import DenoisingScoreMatching, geometric_levels
from pyro_ebm.infer.score.kernel_stein import KernelStein
from pyro_ebm.infer.score.recovery_likelihood import RecoveryLikelihood
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.infer.score.sliced import SlicedScoreMatching
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.per_site import PerSite
from pyro_ebm.infer.training.captured_elbo import Captured
from pyro_ebm.infer.training.fit import fit
from pyro_ebm.infer.training.fit_result import FitResult
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
    "Captured",
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
