r"""Is the acceptance ratio that a kernel codes the one that makes its target reversible?

For a proposal with density k, detailed balance asks of every pair of points that

.. math:: \log\alpha(q, q') = U(q) - U(q') + \log k(q' \to q) - \log k(q \to q')

before the cut at zero. Both sides are computed and compared pair by pair: no draws are averaged,
so that there is no noise, and a wrong factor anywhere shows in the first pair. Whether proposals
are really drawn from k, and whether ``step`` accepts by this ratio, are other questions, which
:func:`~pyro_ebm.testing.assert_invariant` answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import State
from pyro_ebm.mcmc.kernels.metropolis import MetropolisKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.testing.problems import Problem

TOLERANCE = 1e-10


def assert_detailed_balance(
    kernel: MetropolisKernel, problem: Problem, *, num_pairs: int = 200
) -> None:
    """Asserts that a kernel's acceptance ratio balances its proposal, to ten digits.

    Half of the pairs are independent draws of the problem, half lead from a draw to a proposal.

    Args:
        kernel: A kernel whose proposal has a density, made for ``problem.dist``.
        problem: The problem.
        num_pairs: Pairs of points.

    Raises:
        AssertionError: If a pair is out of balance.
        TypeError: If the kernel's proposal has no density.

    Example:
        >>> from pyro_ebm.mcmc import MALA
        >>> from pyro_ebm.testing import PROBLEMS
        >>> problem = PROBLEMS["gamma"]()
        >>> assert_detailed_balance(MALA(problem.dist, step_size=0.5), problem)
    """
    target = kernel.bind()
    if not isinstance(kernel, MetropolisKernel) or not isinstance(target, DistributionTarget):
        raise TypeError(
            "assert_detailed_balance needs a kernel made for problem.dist whose proposal has a "
            f"density, got {type(kernel).__name__}: use assert_invariant"
        )
    potential = CapturedPotential(target)
    here = kernel.init(potential, target.position_of(problem.sample(num_pairs)))
    there = kernel.init(potential, target.position_of(problem.sample(num_pairs)))
    for to in (there, kernel.propose(potential, here)):
        _check(kernel, problem, here, to, _gap(kernel, potential, here, to))


def _gap(kernel: MetropolisKernel, potential: CapturedPotential, here: State, to: State) -> Tensor:
    """Coded less wanted ratio, over the size of what enters it."""
    forth = kernel.proposal_log_prob(potential, here, to)
    back = kernel.proposal_log_prob(potential, to, here)
    wanted = potential.value(here.position) - potential.value(to.position) + back - forth
    size = forth.abs() + back.abs() + here.potential.abs() + to.potential.abs() + 1.0
    return (kernel.log_accept(potential, here, to) - wanted).abs() / size


def _check(kernel: MetropolisKernel, problem: Problem, here: State, to: State, gap: Tensor) -> None:
    worst = int(gap.nan_to_num(torch.inf).argmax())
    if not float(gap[worst]) < TOLERANCE:
        raise AssertionError(
            f"{type(kernel).__name__} on {problem.name} is out of balance by a relative "
            f"{float(gap[worst]):.2g} (at most {TOLERANCE}) between {here.position[worst].tolist()}"
            f" and {to.position[worst].tolist()}"
        )
