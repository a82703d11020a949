"""Statistical assertions and target problems with known answers, for tests of samplers."""

from pyro_ebm.testing import problems
from pyro_ebm.testing.coverage import Coverage, coverage
from pyro_ebm.testing.detailed_balance import assert_detailed_balance
from pyro_ebm.testing.geweke import GewekeResult, geweke_test
from pyro_ebm.testing.invariance import assert_invariant
from pyro_ebm.testing.problems import Problem
from pyro_ebm.testing.simulation_based_calibration import (
    CalibrationResult,
    simulation_based_calibration,
)
from pyro_ebm.testing.statistics import assert_mean_close, assert_order

PROBLEMS = problems.MAKERS
"""Name to maker of every problem."""

__all__ = [
    "PROBLEMS",
    "CalibrationResult",
    "Coverage",
    "GewekeResult",
    "Problem",
    "assert_detailed_balance",
    "assert_invariant",
    "assert_mean_close",
    "assert_order",
    "coverage",
    "geweke_test",
    "simulation_based_calibration",
]
