r"""Preconditioned Crank–Nicolson: a walk that keeps a Gaussian prior in any dimension.

With the prior :math:`N(m, \Sigma)` and :math:`z = q - m`, :math:`z' = \sqrt{1 - s^2}\, z + s\,\nu`
for :math:`\nu \sim N(0, \Sigma)` is reversible with respect to the prior, so it is accepted by
:math:`E(q) - E(q')` alone.

References:
    Cotter, Roberts, Stuart, White, MCMC methods for functions, Statistical Science 28, 2013.
    arXiv:1202.0709.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import State
from pyro_ebm.mcmc.kernels.metropolis import MetropolisKernel, normal_log_prob
from pyro_ebm.mcmc.kernels.prior_kernel import PriorKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import probability


class PCN(PriorKernel, MetropolisKernel):
    """Preconditioned Crank–Nicolson, for targets with a Gaussian base.

    Args:
        target: An ``EnergyDistribution`` or ``GeneralizedEBM`` with a Gaussian base or prior.
        step_size: The first s, in (0, 1): the share of the prior's scale that is renewed; .5 by
            default.
        target_accept_prob: What s is adapted to; .3 by default.
        adapt_step_size: Whether warm-up tunes s.
        **options: Those of :class:`Kernel`: ``inverse_temperature``.

    Example:
        >>> PCN(lambda: None).step_size
        0.5
    """

    largest_step_size = 1.0
    first_step_size = 0.5
    best_accept_prob = 0.3

    def __init__(
        self,
        target: Any = None,
        *,
        step_size: float | None = None,
        target_accept_prob: float | None = None,
        adapt_step_size: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        first = self.first_step_size if step_size is None else step_size
        wanted = self.best_accept_prob if target_accept_prob is None else target_accept_prob
        self.step_size = probability("step_size", first)
        self.target_accept_prob = probability("target_accept_prob", wanted)
        self.adapt_step_size = adapt_step_size

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns s."""
        return {"step_size": q.new_tensor(self.step_size)}

    def propose(self, potential: CapturedPotential, state: State) -> State:
        """Returns a rotation of every chain towards a draw from the prior; one energy."""
        q = self._centre(potential, state) + state.tuning["step_size"] * self.draw_prior(
            potential, state
        )
        return self.at(potential, state, q)

    def log_accept(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns E - E': the proposal is reversible with respect to the prior."""
        return state.extra["energy"] - to.extra["energy"]

    def proposal_log_prob(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns the log density of the proposal."""
        scale = state.tuning["step_size"] * self.prior(potential).scale
        return normal_log_prob(to.position, self._centre(potential, state), scale)

    def _centre(self, potential: CapturedPotential, state: State) -> Tensor:
        loc = self.prior(potential).loc
        return loc + (1.0 - state.tuning["step_size"].square()).sqrt() * (state.position - loc)
