r"""Hamiltonian Monte Carlo with jittered trajectories, all chains in step.

Every iteration draws momenta, follows :math:`L = \lceil u T / \epsilon \rceil` leapfrog steps and
accepts by :math:`\min(1, e^{-\Delta H})`. The length :math:`T` is multiplied by a quasi-random
:math:`u \in (0, 2)` of mean one that all chains share, so that no trajectory length resonates with
a period of the target, and no chain waits for another.

Where the step size is so small that T would need more than ``max_steps`` of them, trajectories are
cut short: draws are still those of the target, T is no longer what was asked for, and ``n_steps``
in the diagnostics stands at that number. While every chain still has a step size of its own, early
in the warm-up, ten steps are the most.

References:
    Neal, MCMC using Hamiltonian dynamics, Handbook of MCMC, 2011. arXiv:1206.1901.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc.kernels.hamiltonian import LeapfrogKernel, draw_momentum, leapfrog, metropolis
from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import positive, whole

_STARTS = 2**10
SETTLING_STEPS = 10  # as long as the scale of the target is unknown


class HMC(LeapfrogKernel):
    r"""Hamiltonian Monte Carlo.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        trajectory_length: T, in units of the whitened coordinates; :math:`\pi/2` by default.
        jitter: Whether trajectory lengths vary.
        max_steps: Leapfrog steps of a trajectory at most, however small they are: the bound of what
            one iteration costs.
        **options: Those of :class:`~pyro_ebm.mcmc.kernels.tuned_kernel.TunedKernel`: ``step_size``,
            ``target_accept_prob`` (.8), ``adapt_step_size``, ``adapt_mass_matrix``, ``metric``.

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
        trajectory_length: float = math.pi / 2,
        jitter: bool = True,
        max_steps: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        self.trajectory_length = positive("trajectory_length", trajectory_length)
        self.jitter = jitter
        self.max_steps = whole("max_steps", max_steps, least=1)

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns step size, metric and trajectory length."""
        return super().first_tuning(q) | {
            "trajectory_length": q.new_tensor(self.trajectory_length),
            "iteration": torch.zeros((), dtype=torch.long),
        }

    def init(self, potential: CapturedPotential, q: Tensor) -> State:
        """Returns the first state, anywhere in the sequence of lengths.

        Were it always the beginning, runs of a few steps would all take the same lengths.
        """
        start = torch.randint(_STARTS, ())
        return super().init(potential, q).with_tuning(iteration=start)

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain along one trajectory."""
        return self.move(potential, state)[:2]

    def move(self, potential: CapturedPotential, state: State) -> tuple[State, Info, State, Tensor]:
        """Returns what :meth:`step` does, and the trajectories' ends with their momenta."""
        num_steps = self.num_steps(state)
        p = draw_momentum(state)
        end, p_end = leapfrog(potential, state, p, state.tuning["step_size"], num_steps)
        moved, info = metropolis(state, end, p, p_end, num_steps)
        count = state.tuning["iteration"] + 1
        return moved.with_tuning(iteration=count), info, end, p_end

    def share(self, state: State) -> float:
        """Returns the factor of mean one on this iteration's trajectory length."""
        return 2.0 * van_der_corput(int(state.tuning["iteration"]) + 1) if self.jitter else 1.0

    def num_steps(self, state: State) -> int:
        """Returns L of this iteration.

        Raises:
            NonFiniteEnergyError: If the step size has shrunk to nothing.
        """
        length = self.share(state) * float(state.tuning["trajectory_length"])
        step_size = float(state.tuning["step_size"].median())
        if not step_size > 0:
            raise NonFiniteEnergyError(
                f"{type(self).__name__}: the step size has shrunk to {step_size}, because no step "
                "however small was accepted. Is there noise in the energy, or a gradient that is "
                "not the potential's?"
            )
        largest = SETTLING_STEPS if is_settling(state) else self.max_steps
        return min(largest, max(1, math.ceil(length / step_size)))


def is_settling(state: State) -> bool:
    """Whether every chain still has a step size of its own."""
    return state.tuning["step_size"].dim() > 0


def van_der_corput(index: int) -> float:
    """Returns a term of the base-2 van der Corput sequence, in (0, 1)."""
    value, weight = 0.0, 0.5
    while index:
        value += weight * (index & 1)
        index >>= 1
        weight *= 0.5
    return value
