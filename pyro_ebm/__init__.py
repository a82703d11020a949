"""Unnormalized models as first-class citizens of Pyro.

An energy becomes a distribution that knows what is known of its normalizer and for which
parameters; a contrastive objective becomes an effect handler; a log Z that is missing where it
matters is an error, never a silent bias.

Importing changes nothing global but one key of ``pyro.settings``: ``ebm_missing_normalizer``.
"""

from pyro_ebm import (
    chains,
    datasets,
    distributions,
    energies,
    infer,
    mcmc,
    normalizers,
    poutine,
    settings,
)
from pyro_ebm.chains import diagnose, to_arviz
from pyro_ebm.distributions import (
    EnergyDistribution,
    GeneralizedEBM,
    PushforwardDistribution,
    energy_factor,
    unwrap,
)
from pyro_ebm.errors import (
    ApproximateSampleWarning,
    ConditionalEnergyError,
    DivergedTrainingError,
    MissingNormalizerError,
    NonFiniteEnergyError,
)
from pyro_ebm.infer import fit
from pyro_ebm.normalizers import estimate_log_normalizer
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.poutine import LatentReparam, check_model

__version__ = "0.1.0.dev0"

__all__ = [
    "ApproximateSampleWarning",
    "ConditionalEnergyError",
    "DivergedTrainingError",
    "EnergyDistribution",
    "GeneralizedEBM",
    "LatentReparam",
    "LogNormalizer",
    "MissingNormalizerError",
    "NonFiniteEnergyError",
    "PushforwardDistribution",
    "chains",
    "check_model",
    "datasets",
    "diagnose",
    "distributions",
    "energies",
    "energy_factor",
    "estimate_log_normalizer",
    "fit",
    "infer",
    "mcmc",
    "normalizers",
    "poutine",
    "settings",
    "to_arviz",
    "unwrap",
]
