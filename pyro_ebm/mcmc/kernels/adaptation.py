r"""What the warm-up tunes, and when it stops.

*At first every chain has a step size of its own*, by dual averaging on its own acceptance: a chain
that starts where the target is stiff would reject forever with the step size of the others, and a
mean over chains would not notice. After this stretch all chains share one step size that follows
the harmonic mean of their acceptance: where all chains are alike it is the mean, and where a few
have come to a stiff place it is far below. *The metric* is estimated from all chains and the
iterations of a window. Windows double in length; after each the step size starts anew. A last
stretch tunes the step size alone. Everything is frozen before the first kept draw.
"""

from __future__ import annotations

from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import Info, Kernel, State
from pyro_ebm.mcmc.kernels.metric import MetricEstimate, resolved
from pyro_ebm.ops.adaptation import DualAveraging

FIRST_SHARE, LAST_SHARE, FIRST_WINDOW = 0.15, 0.15, 10
MEMORY = 0.8  # of a chain's acceptance, per iteration
STUCK = 0.05  # acceptance that stands for none


class Adaptation:
    """Tunes a kernel's state over the iterations of a warm-up.

    Args:
        kernel: The kernel, with its options.
        num_steps: Iterations of the warm-up.
    """

    def __init__(self, kernel: Kernel, num_steps: int) -> None:
        self.kernel = kernel
        self.tunes_step = kernel.adapt_step_size and num_steps > 0
        self.metric = kernel.metric
        self.ends = frozenset(window_ends(num_steps) if kernel.adapt_mass_matrix else ())
        self.first = int(FIRST_SHARE * num_steps)
        self.settled = min(self.ends, default=self.first)
        self._iteration = 0
        self._recent: Tensor | None = None

    def begin(self, state: State) -> State:
        """Returns the state with a step size for every chain, ``(C, 1)``."""
        self.metric = resolved(self.metric, *state.position.shape)
        self._estimate = MetricEstimate(self.metric)
        if not self.tunes_step:
            return state
        if self.settled > 0:
            each = state.tuning["step_size"].expand(len(state.position), 1)
            state = state.with_tuning(step_size=each)
        self._step = self._averaging(state)
        return state

    def _averaging(self, state: State) -> DualAveraging:
        first = state.tuning["step_size"]
        kernel = self.kernel
        return DualAveraging(
            first, target=kernel.target_accept_prob, largest=kernel.largest_step_size
        )

    def update(self, state: State, info: Info) -> State:
        """Returns the state with new tuning."""
        self._iteration += 1
        if self.tunes_step:
            state = self._new_step(state, info["acceptance_rate"].to(state.potential.dtype))
        if self.kernel.adapt_mass_matrix and self._iteration > self.first:
            self._estimate.update(state)
        if self._iteration in self.ends:
            state = self._new_metric(state)
        return state

    def _pooled(self, accept_prob: Tensor) -> Tensor:
        """The harmonic mean over chains of what each accepted lately."""
        recent = accept_prob if self._recent is None else self._recent
        self._recent = MEMORY * recent + (1.0 - MEMORY) * accept_prob
        return 1.0 / (1.0 / self._recent.clamp_min(STUCK)).mean()

    @property
    def metric_is_final(self) -> bool:
        """Whether only step sizes are left to tune, in the next iteration."""
        return self._iteration >= max(self.ends, default=self.settled)

    def _new_step(self, state: State, accept_prob: Tensor) -> State:
        settling = self._iteration <= self.settled
        self._step.update(accept_prob[:, None] if settling else self._pooled(accept_prob))
        state = state.with_tuning(step_size=self._step.step_size)
        if self._iteration == self.settled:  # from here on, one step size for all
            self._step.freeze()
            state = state.with_tuning(step_size=self._step.step_size.median())
            self._step = self._averaging(state)
        return state

    def _new_metric(self, state: State) -> State:
        state = state.with_tuning(root=self._estimate.root(state.position))
        self._estimate = MetricEstimate(self.metric)
        if self.tunes_step:
            self._step = self._averaging(state)
        return state

    def finish(self, state: State) -> State:
        """Returns the state with the averaged step size; nothing is tuned after."""
        if not self.tunes_step:
            return state
        self._step.freeze()
        return state.with_tuning(step_size=self._step.step_size)


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
