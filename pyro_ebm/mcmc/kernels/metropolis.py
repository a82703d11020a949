r"""Metropolis–Hastings: propose, and accept by the ratio that makes the target reversible.

.. math:: \log\alpha = \min\big(0,\; U(q) - U(q') + \log k(q' \to q) - \log k(q \to q')\big)

with the density :math:`k` of the proposal. Kernels code the ratio in a stabler form of their own;
:func:`~pyro_ebm.testing.assert_detailed_balance` compares it with this one, point by point.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import Info, State, chosen
from pyro_ebm.mcmc.kernels.pyro_kernel import PyroKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential


class MetropolisKernel(PyroKernel):
    """Base of kernels whose proposal has a density."""

    @abstractmethod
    def propose(self, potential: CapturedPotential, state: State) -> State:
        """Returns where every chain may go next."""

    @abstractmethod
    def log_accept(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns the log acceptance ratio before it is cut at 0, ``(C,)``."""

    @abstractmethod
    def proposal_log_prob(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns log k(state -> to), ``(C,)``, up to a constant that both directions share."""

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves the chains whose proposals are accepted."""
        proposal = self.propose(potential, state)
        moved, accept_prob = accept(state, proposal, self.log_accept(potential, state, proposal))
        lost = ~torch.isfinite(proposal.potential)
        # A walk that steps out of the support has not diverged: no trajectory has gone wrong.
        name = "diverging" if self.needs_gradient else "non_finite"
        return moved, {"acceptance_rate": accept_prob, name: lost}


def accept(state: State, proposal: State, log_ratio: Tensor) -> tuple[State, Tensor]:
    """Moves the chains whose proposals are accepted; one decision per chain.

    Args:
        state: Where the chains are.
        proposal: Where they may go.
        log_ratio: Log acceptance ratios ``(C,)``; what is not finite is rejected.

    Returns:
        The next state and the acceptance probabilities ``(C,)``.
    """
    moves, accept_prob = decisions(log_ratio)
    return chosen(moves, proposal, state), accept_prob


def decisions(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which moves are accepted, and with what probability they are, of any shape.

    Args:
        log_ratio: Log acceptance ratios; what is not finite is rejected.
    """
    log_ratio = torch.where(torch.isfinite(log_ratio), log_ratio, -torch.inf)
    moves = torch.rand_like(log_ratio).log() < log_ratio
    return moves, log_ratio.clamp(max=0.0).exp()


def normal_log_prob(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Returns the log density of independent Gaussians, ``(C,)``, up to a constant.

    Its normalizer, scale included, is left out: both directions of a move share it.

    Args:
        x: Where, ``(C, D)``.
        mean: Means that broadcast with it.
        scale: Standard deviations that broadcast with it.
    """
    return -0.5 * ((x - mean) / scale).square().sum(-1)
