"""Estimators of log Z, each with an error bar and what speaks against it."""

from pyro_ebm.normalizers.ais import ais
from pyro_ebm.normalizers.anchored import Anchored, anchored
from pyro_ebm.normalizers.bridge import bridge
from pyro_ebm.normalizers.estimate import estimate_log_normalizer
from pyro_ebm.normalizers.exact import exact
from pyro_ebm.normalizers.importance import importance
from pyro_ebm.normalizers.quadrature import Box, find_box, quadrature
from pyro_ebm.normalizers.smc import smc

__all__ = [
    "Anchored",
    "Box",
    "ais",
    "anchored",
    "bridge",
    "estimate_log_normalizer",
    "exact",
    "find_box",
    "importance",
    "quadrature",
    "smc",
]
