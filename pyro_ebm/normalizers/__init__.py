"""Estimators of log Z, each with an error bar and what speaks against it."""

from pyro_ebm.normalizers.ais import ais
from pyro_ebm.normalizers.anchor_error import AnchorError, mcse_logz
from pyro_ebm.normalizers.anchored import Anchored, anchored
from pyro_ebm.normalizers.anchoring import anchored_to
from pyro_ebm.normalizers.base_importance import BaseImportance, base_importance
from pyro_ebm.normalizers.bridge import bridge
from pyro_ebm.normalizers.estimate import estimate_log_normalizer
from pyro_ebm.normalizers.evidence import BayesFactor, Evidence, bayes_factor, evidence
from pyro_ebm.normalizers.exact import exact
from pyro_ebm.normalizers.from_uniform import from_uniform
from pyro_ebm.normalizers.gauss_hermite import gauss_hermite
from pyro_ebm.normalizers.importance import importance
from pyro_ebm.normalizers.nce import nce, nce_covariance
from pyro_ebm.normalizers.quadrature import Box, find_box, quadrature
from pyro_ebm.normalizers.smc import smc
from pyro_ebm.normalizers.tempered import TemperedRun, tempered
from pyro_ebm.normalizers.thermodynamic import stepping_stones, thermodynamic

__all__ = [
    "AnchorError",
    "Anchored",
    "BaseImportance",
    "BayesFactor",
    "Box",
    "Evidence",
    "TemperedRun",
    "ais",
    "anchored",
    "anchored_to",
    "base_importance",
    "bayes_factor",
    "bridge",
    "estimate_log_normalizer",
    "evidence",
    "exact",
    "find_box",
    "from_uniform",
    "gauss_hermite",
    "importance",
    "mcse_logz",
    "nce",
    "nce_covariance",
    "quadrature",
    "smc",
    "stepping_stones",
    "tempered",
    "thermodynamic",
]
