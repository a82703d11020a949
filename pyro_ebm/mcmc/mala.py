r"""The Metropolis-adjusted Langevin algorithm: one leapfrog step, accepted or rejected.

:math:`v \sim N(0, M)`, one leapfrog step of :math:`\epsilon`, acceptance by :math:`\Delta H`. This
is the Langevin proposal :math:`q - \frac{\epsilon^2}{2} M^{-1} \nabla U + \epsilon M^{-1/2} \xi`
with its Metropolis ratio, written in the numerically stabler way.

References:
    Roberts, Rosenthal, Optimal scaling of discrete approximations to Langevin diffusions,
    JRSS B 60, 1998 (the acceptance rate .574).
"""

from __future__ import annotations

from typing import Any

from pyro_ebm.mcmc.hmc import HMC
from pyro_ebm.mcmc.kernel import State


class MALA(HMC):
    """HMC with one leapfrog step.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        potential_fn: Instead of it, a potential (see :class:`Kernel`).
        step_size: The first step; found by doubling if not given.
        target_accept_prob: What the step size is adapted to.
        adapt_step_size: Whether warm-up tunes the step size.
        adapt_mass_matrix: Whether warm-up tunes the scale of each coordinate.

    Example:
        >>> MALA(lambda: None).target_accept_prob
        0.574
    """

    def __init__(
        self,
        target: Any = None,
        *,
        potential_fn: Any = None,
        step_size: float | None = None,
        target_accept_prob: float = 0.574,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
    ) -> None:
        super().__init__(
            target,
            potential_fn=potential_fn,
            step_size=step_size,
            target_accept_prob=target_accept_prob,
            adapt_step_size=adapt_step_size,
            adapt_mass_matrix=adapt_mass_matrix,
            jitter=False,
        )

    def num_steps(self, state: State) -> int:
        """Returns 1."""
        return 1
