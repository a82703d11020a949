"""Statistical assertions and target problems with known answers, for tests of samplers."""

from pyro_ebm.testing import problems
from pyro_ebm.testing.detailed_balance import assert_detailed_balance
from pyro_ebm.testing.invariance import assert_invariant
from pyro_ebm.testing.problems import Problem
from pyro_ebm.testing.statistics import assert_mean_close, assert_order

PROBLEMS = problems.MAKERS
"""Name to maker of every problem."""

__all__ = [
    "PROBLEMS",
    "Problem",
    "assert_detailed_balance",
    "assert_invariant",
    "assert_mean_close",
    "assert_order",
]
