r"""Hamiltonian Monte Carlo with jittered trajectories, all chains in step.

Every iteration draws momenta, follows :math:`L = \lceil u T / \epsilon \rceil` leapfrog steps and
accepts by :math:`\min(1, e^{-\Delta H})`. The length :math:`T` is multiplied by a quasi-random
:math:`u \in (0, 2)` of mean one that all chains share, so that no trajectory length resonates with
a period of the target, and no chain waits for another.

References:
    Neal, MCMC using Hamiltonian dynamics, Handbook of MCMC, 2011. arXiv:1206.1901.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.checks import positive, probability
from pyro_ebm.mcmc.hamiltonian import draw_momentum, leapfrog, metropolis
from pyro_ebm.mcmc.kernel import Info, Kernel, State

MAX_STEPS = 1000


class HMC(Kernel):
    r"""Hamiltonian Monte Carlo.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        potential_fn: Instead of it, a potential (see :class:`Kernel`).
        step_size: The first leapfrog step :math:`\epsilon`; found by doubling if not given.
        trajectory_length: T, in units of the whitened coordinates; :math:`\pi/2` by default.
        target_accept_prob: What the step size is adapted to.
        adapt_step_size: Whether warm-up tunes the step size.
        adapt_mass_matrix: Whether warm-up tunes the diagonal of :math:`M^{-1}`.
        jitter: Whether trajectory lengths vary.

    Example:
        >>> import torch
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.mcmc import MCMC
        >>> law = EnergyDistribution(lambda x: 0.5 * (x**2).sum(-1), event_shape=(3,))
        >>> mcmc = MCMC(HMC(law), 50, 50, num_chains=16, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].shape
        torch.Size([16, 50, 3])
    """

    def __init__(
        self,
        target: Any = None,
        *,
        potential_fn: Any = None,
        step_size: float | None = None,
        trajectory_length: float = math.pi / 2,
        target_accept_prob: float = 0.8,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        jitter: bool = True,
    ) -> None:
        super().__init__(target, potential_fn=potential_fn)
        self.step_size = None if step_size is None else positive("step_size", step_size)
        self.trajectory_length = positive("trajectory_length", trajectory_length)
        self.target_accept_prob = probability("target_accept_prob", target_accept_prob)
        self.adapt_step_size = adapt_step_size
        self.adapt_mass_matrix = adapt_mass_matrix
        self.jitter = jitter

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns the given or a unit step size, a unit mass and the trajectory length."""
        return {
            "step_size": q.new_tensor(self.step_size or 1.0),
            "inverse_mass": q.new_ones(q.shape[1]),
            "trajectory_length": q.new_tensor(self.trajectory_length),
            "iteration": torch.zeros((), dtype=torch.long),
        }

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain along one trajectory."""
        num_steps = self.num_steps(state)
        p = draw_momentum(state)
        end, p_end = leapfrog(potential, state, p, state.tuning["step_size"], num_steps)
        moved, info = metropolis(state, end, p, p_end, num_steps)
        return moved.with_tuning(iteration=state.tuning["iteration"] + 1), info

    def num_steps(self, state: State) -> int:
        """Returns L of this iteration."""
        length = float(state.tuning["trajectory_length"])
        if self.jitter:
            length *= 2.0 * halton(int(state.tuning["iteration"]) + 1)
        return min(MAX_STEPS, max(1, math.ceil(length / float(state.tuning["step_size"]))))


def halton(index: int) -> float:
    """Returns a term of the base-2 van der Corput sequence, in (0, 1)."""
    value, weight = 0.0, 0.5
    while index:
        value += weight * (index & 1)
        index >>= 1
        weight *= 0.5
    return value
