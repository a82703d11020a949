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

from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import State
from pyro_ebm.mcmc.kernels.metropolis import normal_log_prob
from pyro_ebm.mcmc.kernels.pcn import PCN
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.target import GaussianPrior


class PCNL(PCN):
    r"""Preconditioned Crank–Nicolson Langevin, for targets with a Gaussian base.

    Takes the arguments of :class:`PCN`; ``step_size`` is the first :math:`\delta`, in (0, 1), .1 by
    default, and is adapted to an acceptance of .574.

    Example:
        >>> PCNL(lambda: None).needs_gradient
        True
    """

    needs_gradient = True
    first_step_size = 0.1
    best_accept_prob = 0.574

    def propose(self, potential: CapturedPotential, state: State) -> State:
        """Returns a proposal for every chain; one gradient."""
        noise = self._noise_scale(state) * self.draw_prior(potential, state)
        return self.at(potential, state, self._centre(potential, state) + noise)

    def log_accept(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns rho(q, q') - rho(q', q)."""
        return self._rho(potential, state, to) - self._rho(potential, to, state)

    def proposal_log_prob(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns the log density of the proposal."""
        scale = self._noise_scale(state) * self.prior(potential).scale
        return normal_log_prob(to.position, self._centre(potential, state), scale)

    @staticmethod
    def _noise_scale(state: State) -> Tensor:
        delta = state.tuning["step_size"]
        return (8.0 * delta).sqrt() / (2.0 + delta)

    def _centre(self, potential: CapturedPotential, state: State) -> Tensor:
        prior, delta = self.prior(potential), state.tuning["step_size"]
        z, g = state.position - prior.loc, _slope(state, prior)
        drift = (2.0 - delta) * z - 2.0 * delta * prior.scale.square() * g
        return prior.loc + drift / (2.0 + delta)

    def _rho(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        prior, delta = self.prior(potential), state.tuning["step_size"]
        z, new, g = state.position - prior.loc, to.position - prior.loc, _slope(state, prior)
        along = 0.5 * (new - z) + 0.25 * delta * (z + new + prior.scale.square() * g)
        return state.extra["energy"] + (g * along).sum(-1)


def _slope(state: State, prior: GaussianPrior) -> Tensor:
    """The gradient of E, that of U without the prior's part."""
    return state.gradient - (state.position - prior.loc) / prior.scale.square()
