r"""What the warm-up tunes for all chains together, and when it stops.

*The step size* follows the chains' mean acceptance by dual averaging. *The metric* is the diagonal
of the inverse mass: variances pooled over all chains and the iterations of a window, shrunk towards
a thousandth and kept off zero. Windows double in length; after each the step size starts anew. A
first and a last stretch tune the step size alone. Everything is frozen before the first kept draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.hamiltonian import LeapfrogKernel, draw_momentum, leapfrog, metropolis
from pyro_ebm.mcmc.kernel import Info, Kernel, State
from pyro_ebm.ops.adaptation import DualAveraging, PooledVariance

FIRST_SHARE, LAST_SHARE, FIRST_WINDOW = 0.15, 0.15, 10
MAX_DOUBLINGS = 50


class Adaptation:
    """Tunes a kernel's state over the iterations of a warm-up.

    Args:
        kernel: The kernel, with its options.
        state: The state before the warm-up.
        num_steps: Iterations of the warm-up.
    """

    def __init__(self, kernel: Kernel, state: State, num_steps: int) -> None:
        self.tunes_step = bool(getattr(kernel, "adapt_step_size", False)) and num_steps > 0
        self.tunes_metric = bool(getattr(kernel, "adapt_mass_matrix", False))
        self.target = float(getattr(kernel, "target_accept_prob", 0.0))
        self.largest = float(getattr(kernel, "largest_step_size", torch.inf))
        self.uses_harmonic_mean = bool(getattr(kernel, "uses_harmonic_mean", False))
        self.ends = frozenset(window_ends(num_steps)) if self.tunes_metric else frozenset()
        self.first = int(FIRST_SHARE * num_steps)
        self._variance = PooledVariance()
        self._iteration = 0
        if self.tunes_step:
            self._step = self._averaging(state)

    def _averaging(self, state: State) -> DualAveraging:
        first = state.tuning["step_size"]
        return DualAveraging(first, target=self.target, largest=self.largest)

    def update(self, state: State, info: Info) -> State:
        """Returns the state with new tuning."""
        self._iteration += 1
        if self.tunes_step:
            self._step.update(self._pooled(info["acceptance_rate"]).to(state.potential.dtype))
            state = state.with_tuning(step_size=self._step.step_size)
        if self.tunes_metric and self._iteration > self.first:
            self._variance.update(state.position)
        if self._iteration in self.ends:
            state = self._new_metric(state)
        return state

    def _pooled(self, accept_prob: Tensor) -> Tensor:
        if self.uses_harmonic_mean:
            return 1.0 / (1.0 / accept_prob.clamp_min(1e-6)).mean()
        return accept_prob.mean()

    def _new_metric(self, state: State) -> State:
        state = state.with_tuning(inverse_mass=shrunk(self._variance, state.position))
        self._variance = PooledVariance()
        if self.tunes_step:
            self._step = self._averaging(state)
        return state

    def finish(self, state: State) -> State:
        """Returns the state with the averaged step size; nothing is tuned after."""
        if not self.tunes_step:
            return state
        self._step.freeze()
        return state.with_tuning(step_size=self._step.step_size)


def shrunk(variance: PooledVariance, like: Tensor) -> Tensor:
    """Returns the pooled variances, shrunk towards a thousandth, ``(D,)``."""
    count = float(variance.count)
    share = count / (count + 5.0)
    return (share * variance.variance[0] + 1e-3 * (1.0 - share)).to(like.dtype)


def window_ends(num_steps: int) -> list[int]:
    """Returns the iterations after which the metric is renewed, counted from 1.

    Example:
        >>> window_ends(300)
        [55, 75, 115, 255]
    """
    begin, end = int(FIRST_SHARE * num_steps), num_steps - int(LAST_SHARE * num_steps)
    ends, length, at = [], FIRST_WINDOW, begin
    while at + length <= end:
        at += length
        length *= 2
        ends.append(at)
    if ends and ends[-1] != end:
        ends[-1] = end  # the rest would be too short a window of its own
    return ends


def find_step_size(kernel: Kernel, potential: CapturedPotential, state: State) -> State:
    """Doubles or halves the leapfrog step until the acceptance of one step crosses .8."""
    if not isinstance(kernel, LeapfrogKernel) or kernel.step_size is not None:
        return state
    direction = 0
    for _ in range(MAX_DOUBLINGS):
        p = draw_momentum(state)
        end, p_end = leapfrog(potential, state, p, state.tuning["step_size"], 1)
        _, info = metropolis(state, end, p, p_end, 1)
        wanted = 1 if float(info["acceptance_rate"].mean()) > 0.8 else -1
        if direction and wanted != direction:
            break
        direction = wanted
        state = state.with_tuning(step_size=state.tuning["step_size"] * 2.0**direction)
    return state
