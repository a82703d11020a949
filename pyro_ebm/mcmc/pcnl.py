r"""Preconditioned Crank–Nicolson Langevin: a prior-preserving proposal that follows the energy.

For the prior :math:`N(m, \Sigma)`, :math:`z = q - m` and :math:`g = \nabla E(q)`,

.. math::
    (2 + \delta)\, z' = (2 - \delta)\, z - 2\delta\, \Sigma g + \sqrt{8\delta}\, \nu, \qquad
    \nu \sim N(0, \Sigma),

accepted by :math:`\rho(q, q') - \rho(q', q)` with :math:`\rho(q, q') = E(q) + \tfrac12 g^\top (z' -
z) + \tfrac\delta4 g^\top (z + z') + \tfrac\delta4 g^\top \Sigma g`.

References:
    Cotter, Roberts, Stuart, White, MCMC methods for functions, Statistical Science 28, 2013.
    arXiv:1202.0709.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.kernel import Info, State, accept
from pyro_ebm.mcmc.pcn import PCN
from pyro_ebm.mcmc.target import GaussianPrior


class PCNL(PCN):
    r"""Preconditioned Crank–Nicolson Langevin, for targets with a Gaussian base.

    Args:
        target: An ``EnergyDistribution`` or ``GeneralizedEBM`` with a Gaussian base or prior.
        step_size: The first :math:`\delta`, in (0, 1).
        target_accept_prob: What :math:`\delta` is adapted to.
        adapt_step_size: Whether warm-up tunes :math:`\delta`.

    Example:
        >>> PCNL(lambda: None).needs_gradient
        True
    """

    needs_gradient = True

    def __init__(
        self,
        target: Any = None,
        *,
        step_size: float = 0.1,
        target_accept_prob: float = 0.574,
        adapt_step_size: bool = True,
    ) -> None:
        super().__init__(
            target,
            step_size=step_size,
            target_accept_prob=target_accept_prob,
            adapt_step_size=adapt_step_size,
        )

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain; one gradient."""
        prior, delta = self.prior(potential), state.tuning["step_size"]
        variance = prior.scale.square()
        z, g = state.position - prior.loc, self._slope(state.position, state.gradient, prior)
        noise = (8.0 * delta).sqrt() * self.draw_prior(potential, state)
        new = ((2.0 - delta) * z - 2.0 * delta * variance * g + noise) / (2.0 + delta)
        q = prior.loc + new
        proposal = self.at(potential, state, q)
        g_new = self._slope(q, proposal.gradient, prior)
        forth = _rho(state.extra["energy"], g, z, new, delta, variance)
        back = _rho(proposal.extra["energy"], g_new, new, z, delta, variance)
        moved, accept_prob = accept(state, proposal, forth - back)
        return moved, {"acceptance_rate": accept_prob}

    @staticmethod
    def _slope(q: Tensor, gradient: Tensor, prior: GaussianPrior) -> Tensor:
        """The gradient of E, that of U without the prior's part."""
        return gradient - (q - prior.loc) / prior.scale.square()


def _rho(energy: Tensor, g: Tensor, z: Tensor, to: Tensor, delta: Tensor, v: Tensor) -> Tensor:
    inner = 0.5 * (to - z) + 0.25 * delta * (z + to) + 0.25 * delta * v * g
    return energy + (g * inner).sum(-1)
