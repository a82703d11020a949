r"""The Metropolis-adjusted Langevin algorithm: one leapfrog step, accepted or rejected.

:math:`v \sim N(0, M)`, one leapfrog step of :math:`\epsilon`, acceptance by :math:`\Delta H`. This
is the Langevin proposal :math:`q - \frac{\epsilon^2}{2} M^{-1} \nabla U + \epsilon M^{-1/2} \xi`
with its Metropolis ratio, written in the numerically stabler way.

References:
    Roberts, Rosenthal, Optimal scaling of discrete approximations to Langevin diffusions,
    JRSS B 60, 1998 (the acceptance rate .574).
"""

from __future__ import annotations

from torch import Tensor

from pyro_ebm.mcmc.kernels.hamiltonian import (
    LeapfrogKernel,
    draw_momentum,
    leapfrog,
    metropolis,
    total_energy,
)
from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.metric import pulled_back, whitened
from pyro_ebm.mcmc.kernels.metropolis import MetropolisKernel, normal_log_prob
from pyro_ebm.mcmc.targets.captured import CapturedPotential


class MALA(LeapfrogKernel, MetropolisKernel):
    """HMC with one leapfrog step; takes the arguments of its base.

    Example:
        >>> MALA(lambda: None).target_accept_prob
        0.574
    """

    best_accept_prob = 0.574

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain by one leapfrog step."""
        to = self.propose(potential, state)
        return metropolis(state, to, *_momenta(state, to), 1)

    def propose(self, potential: CapturedPotential, state: State) -> State:
        """Returns the end of one leapfrog step."""
        p = draw_momentum(state)
        return leapfrog(potential, state, p, state.tuning["step_size"], 1)[0]

    def log_accept(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns the energy lost along the leapfrog step that leads there."""
        p, p_end = _momenta(state, to)
        return total_energy(state, p) - total_energy(to, p_end)

    def proposal_log_prob(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns the log density of the Langevin proposal."""
        step_size, root = state.tuning["step_size"], state.tuning["root"]
        drift = -0.5 * step_size.square() * pulled_back(state.gradient, root)
        moved = whitened(to.position - state.position, root)
        return normal_log_prob(moved, drift, step_size)


def _momenta(state: State, to: State) -> tuple[Tensor, Tensor]:
    """The whitened momenta at both ends of the one leapfrog step that leads from one to the other.

    They follow from the two points, so that what is accepted by is a function of these alone.
    """
    step_size, root = state.tuning["step_size"], state.tuning["root"]
    half = whitened(to.position - state.position, root) / step_size
    p = half + 0.5 * step_size * pulled_back(state.gradient, root)
    return p, half - 0.5 * step_size * pulled_back(to.gradient, root)
