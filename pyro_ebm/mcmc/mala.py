r"""The Metropolis-adjusted Langevin algorithm: one leapfrog step, accepted or rejected.

:math:`v \sim N(0, M)`, one leapfrog step of :math:`\epsilon`, acceptance by :math:`\Delta H`. This
is the Langevin proposal :math:`q - \frac{\epsilon^2}{2} M^{-1} \nabla U + \epsilon M^{-1/2} \xi`
with its Metropolis ratio, written in the numerically stabler way.

References:
    Roberts, Rosenthal, Optimal scaling of discrete approximations to Langevin diffusions,
    JRSS B 60, 1998 (the acceptance rate .574).
"""

from __future__ import annotations

from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.hamiltonian import LeapfrogKernel, draw_momentum, leapfrog, metropolis
from pyro_ebm.mcmc.kernel import Info, State


class MALA(LeapfrogKernel):
    """HMC with one leapfrog step; takes the arguments of its base.

    Example:
        >>> MALA(lambda: None).target_accept_prob
        0.574
    """

    best_accept_prob = 0.574

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain by one leapfrog step."""
        p = draw_momentum(state)
        end, p_end = leapfrog(potential, state, p, state.tuning["step_size"], 1)
        return metropolis(state, end, p, p_end, 1)
