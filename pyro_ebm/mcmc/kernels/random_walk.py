r"""Random-walk Metropolis: :math:`q' = q + \epsilon R\, \xi`, accepted by :math:`\Delta U`.

It needs no gradient. Its best acceptance rate is about .234 in high dimension.

References:
    Roberts, Gelman, Gilks, Weak convergence and optimal scaling of random walk Metropolis
    algorithms, Annals of Applied Probability 7, 1997.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import State
from pyro_ebm.mcmc.kernels.metric import stretched, whitened
from pyro_ebm.mcmc.kernels.metropolis import MetropolisKernel, normal_log_prob
from pyro_ebm.mcmc.kernels.tuned_kernel import TunedKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential

FIRST_STEP_SIZE = 1.0
BEST_ACCEPT_PROB = 0.234


class RandomWalk(TunedKernel, MetropolisKernel):
    r"""Random-walk Metropolis.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        step_size: The first standard deviation of the jumps; 1 by default.
        target_accept_prob: What the step size is adapted to; .234 by default.
        adapt_step_size: Whether warm-up tunes the step size.
        adapt_mass_matrix: Whether warm-up tunes the metric.
        metric: ``"auto"``, ``"diagonal"`` or ``"dense"`` (:mod:`pyro_ebm.mcmc.kernels.metric`).
        **options: Those of :class:`Kernel`: ``potential_fn``, ``inverse_temperature``.

    Example:
        >>> RandomWalk(lambda: None).needs_gradient
        False
    """

    needs_gradient = False
    first_step_size = FIRST_STEP_SIZE
    best_accept_prob = BEST_ACCEPT_PROB

    def propose(self, potential: CapturedPotential, state: State) -> State:
        """Returns a jump of every chain; one evaluation of U."""
        q = walked(state, state.tuning["step_size"])
        return replace(state, position=q, potential=potential.value(q))

    def log_accept(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns U - U', for jumps are as likely as their reverse."""
        return state.potential - to.potential

    def proposal_log_prob(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns the log density of the jump."""
        jump = whitened(to.position - state.position, state.tuning["root"])
        return normal_log_prob(jump, torch.zeros_like(jump), state.tuning["step_size"])


def walked(state: State, step_size: Tensor) -> Tensor:
    """Returns positions after a jump of every chain, ``(C, D)``.

    Args:
        state: Where the chains are, with their metric.
        step_size: The jumps' standard deviation in whitened coordinates, 0-d or ``(C, 1)``.
    """
    noise = stretched(torch.randn_like(state.position), state.tuning["root"])
    return state.position + step_size * noise
