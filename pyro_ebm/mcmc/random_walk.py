r"""Random-walk Metropolis: :math:`q' = q + \epsilon R\, \xi`, accepted by :math:`\Delta U`.

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
from pyro_ebm.mcmc.kernel import State
from pyro_ebm.mcmc.metric import METRICS, stretched, whitened
from pyro_ebm.mcmc.metropolis import MetropolisKernel, normal_log_prob
from pyro_ebm.ops.arguments import one_of, positive, probability


class RandomWalk(MetropolisKernel):
    r"""Random-walk Metropolis.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        step_size: The first standard deviation of the jumps.
        target_accept_prob: What the step size is adapted to.
        adapt_step_size: Whether warm-up tunes the step size.
        adapt_mass_matrix: Whether warm-up tunes the metric.
        metric: ``"auto"``, ``"diagonal"`` or ``"dense"`` (:mod:`pyro_ebm.mcmc.metric`).
        **options: Those of :class:`Kernel`: ``potential_fn``, ``inverse_temperature``.

    Example:
        >>> RandomWalk(lambda: None).needs_gradient
        False
    """

    needs_gradient = False

    def __init__(
        self,
        target: Any = None,
        *,
        step_size: float = 1.0,
        target_accept_prob: float = 0.234,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        metric: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        self.step_size = positive("step_size", step_size)
        self.target_accept_prob = probability("target_accept_prob", target_accept_prob)
        self.adapt_step_size = adapt_step_size
        self.adapt_mass_matrix = adapt_mass_matrix
        without_gradient = [m for m in METRICS if m != "fisher"]
        self.metric = one_of("metric", metric, without_gradient)

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns the first jump size and unit scales."""
        return {
            "step_size": q.new_tensor(self.step_size),
            "root": q.new_ones(q.shape[1]),
        }

    def propose(self, potential: CapturedPotential, state: State) -> State:
        """Returns a jump of every chain; one evaluation of U."""
        q = state.position + state.tuning["step_size"] * stretched(
            torch.randn_like(state.position), state.tuning["root"]
        )
        return replace(state, position=q, potential=potential.value(q))

    def log_accept(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns U - U', for jumps are as likely as their reverse."""
        return state.potential - to.potential

    def proposal_log_prob(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns the log density of the jump."""
        jump = whitened(to.position - state.position, state.tuning["root"])
        return normal_log_prob(jump, torch.zeros_like(jump), state.tuning["step_size"])
