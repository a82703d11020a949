r"""Random-walk Metropolis: :math:`q' = q + \epsilon M^{-1/2} \xi`, accepted by :math:`\Delta U`.

It needs no gradient. Its best acceptance rate is about .234 in high dimension.

References:
    Roberts, Gelman, Gilks, Weak convergence and optimal scaling of random walk Metropolis
    algorithms, Annals of Applied Probability 7, 1997.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.checks import positive, probability
from pyro_ebm.mcmc.kernel import Info, Kernel, State, accept


class RandomWalk(Kernel):
    r"""Random-walk Metropolis.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        potential_fn: Instead of it, a potential (see :class:`Kernel`).
        step_size: The first standard deviation of the jumps.
        target_accept_prob: What the step size is adapted to.
        adapt_step_size: Whether warm-up tunes the step size.
        adapt_mass_matrix: Whether warm-up tunes the scale of each coordinate.

    Example:
        >>> RandomWalk(lambda: None).needs_gradient
        False
    """

    needs_gradient = False

    def __init__(
        self,
        target: Any = None,
        *,
        potential_fn: Any = None,
        step_size: float = 1.0,
        target_accept_prob: float = 0.234,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
    ) -> None:
        super().__init__(target, potential_fn=potential_fn)
        self.step_size = positive("step_size", step_size)
        self.target_accept_prob = probability("target_accept_prob", target_accept_prob)
        self.adapt_step_size = adapt_step_size
        self.adapt_mass_matrix = adapt_mass_matrix

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns the first jump size and unit scales."""
        return {
            "step_size": q.new_tensor(self.step_size),
            "inverse_mass": q.new_ones(q.shape[1]),
        }

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain; one evaluation of U."""
        scale = state.tuning["step_size"] * state.tuning["inverse_mass"].sqrt()
        q = state.position + scale * torch.randn_like(state.position)
        proposal = replace(state, position=q, potential=potential.value(q))
        moved, accept_prob = accept(state, proposal, state.potential - proposal.potential)
        return moved, {"acceptance_rate": accept_prob}
