r"""Does a kernel keep its target? Exact draws must still be exact draws after a few steps.

Every chain starts from an exact draw :math:`x` and takes k steps to :math:`x'`. For every statistic
f, the mean of :math:`f(x') - f(x)` over the chains must be zero within its standard error. The
chains are independent, so there is neither a burn-in nor an effective sample size to argue about,
and the pairing removes the noise of the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import Kernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.testing.problems import Problem
from pyro_ebm.testing.statistics import MIN_MOVED, assert_mean_close


def assert_invariant(
    kernel: Kernel, problem: Problem, *, num_chains: int = 20_000, num_steps: int = 10
) -> None:
    """Asserts that a kernel keeps the law of a problem.

    The statistics are the unconstrained coordinates, their squares, and the potential, gated at
    five standard errors. With 20 000 chains a bias of a tenth of a standard deviation is seen.

    Args:
        kernel: A kernel made for ``problem.dist``, with the tuning that it is to be tested with.
        problem: The problem.
        num_chains: Chains, each from an exact draw.
        num_steps: Steps of every chain.

    Raises:
        AssertionError: If a statistic has moved, or hardly any chain has.

    Example:
        >>> from pyro_ebm.mcmc import MALA
        >>> from pyro_ebm.testing import PROBLEMS
        >>> _ = torch.manual_seed(0)
        >>> problem = PROBLEMS["gaussian"]()
        >>> assert_invariant(MALA(problem.dist, step_size=0.5), problem, num_chains=2000)
    """
    target = kernel.bind()
    if not isinstance(target, DistributionTarget):
        raise TypeError("assert_invariant needs a kernel made for problem.dist")
    potential = CapturedPotential(target)
    q = target.position_of(problem.sample(num_chains))
    state = kernel.init(potential, q)
    before = _statistics(q, potential)
    for _ in range(num_steps):
        state, _ = kernel.step(potential, state)
    share = float((state.position != q).any(1).double().mean())
    if share < MIN_MOVED:
        raise AssertionError(
            f"{type(kernel).__name__} moved {share:.1%} of the chains on {problem.name}: nothing "
            "was tested, use a smaller step size"
        )
    moved = _statistics(state.position, potential) - before
    assert_mean_close(
        moved, 0.0, what=f"{type(kernel).__name__} on {problem.name}, drift of a mean"
    )


def _statistics(q: Tensor, potential: CapturedPotential) -> Tensor:
    return torch.cat([q, q.square(), potential.value(q)[:, None]], 1)
