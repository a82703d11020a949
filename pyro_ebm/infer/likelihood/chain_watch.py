r"""Noticing that the chains of a training have been of no use for many steps.

The loss of likelihood training by chains tells nothing of how well it goes, and a single step
little: chains lag, energies swing. So four things are averaged over *windows*, the steps between
two powers of two, and judged at their ends:

* how often proposals were accepted: if hardly ever, chains stay where they are;
* how far chains moved in one use, in standard deviations of the data: if hardly at all, data are
  compared with themselves, and the gradient is noise;
* which share of the chains that persist has not moved at all in its last :data:`MANY_USES` uses.
  Where the energy is steep a step that suits the others may overshoot every time. The energy learns
  to explain such points, each of which weighs as much as a datum does and may be far from all of
  them, so that a few of thousands do harm that no mean shows;
* the gap :math:`\overline{U(x)} - \overline{U(x^-)}`. It goes to zero where chains follow the
  energy. Where they are too short to come where the energy is lowered, as short runs from noise may
  be, the energy gains by their distance without end, and the gap grows in proportion to the steps
  or faster: by a factor of two or more from window to window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pyro_ebm.infer.scoring.degenerate import SETTLED
from pyro_ebm.ops.powers_of_two import is_power_of_two

MIN_ACCEPTANCE = 0.1
MIN_MOVE = 0.02
MANY_USES = 64
MAX_STUCK = 2e-4  # one of five thousand chains
GROWTH = 1.5  # of the gap from window to window that counts as running away
WIDE_GAP = 100.0  # in nats; narrower gaps count if they are wide beside the data's own spread
SPREADS = 10.0


@dataclass
class ChainWatch:
    """The window in progress of one site, and the gaps of those before; all of it is saved.

    Args:
        sums: Of what was seen in this window, by name.
        counts: How often.
        gaps: Mean gaps of the windows so far, in nats.
        closed_at: The step at which the last one ended.

    Example:
        >>> watch = ChainWatch()
        >>> watch.sums, watch.counts = {"gap": 0.0, "spread": 1.0, "moved": 0.001}, {"moved": 1}
        >>> print(watch.verdicts(256)[0].split(":")[0])
        over the last 256 steps chains moved by 0.10% of the data's standard deviation at a time
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    closed_at: int = 0

    def see(self, notes: Mapping[str, float]) -> None:
        """Adds one use of the chains.

        Args:
            notes: ``energy_gap`` and ``energy_spread`` in nats, and ``acceptance``, ``moved`` and
                ``stuck`` where they are known; NaN is not counted.
        """
        names = {"energy_gap": "gap", "energy_spread": "spread"}
        for name in ("energy_gap", "energy_spread", "acceptance", "moved", "stuck"):
            value = notes.get(name, math.nan)
            if not math.isnan(value):
                kept = names.get(name, name)
                self.sums[kept] = self.sums.get(kept, 0.0) + value
                self.counts[kept] = self.counts.get(kept, 0) + 1

    def verdicts(self, step: int) -> list[str]:
        """Returns what is to be said at a step, one sentence each; closes a window at its end."""
        if not is_power_of_two(step) or step <= self.closed_at:
            return []
        means = {name: total / self.counts.get(name, 1) for name, total in self.sums.items()}
        window, self.closed_at = step - self.closed_at, step
        self.sums, self.counts = {}, {}
        self.gaps = [*self.gaps[-2:], means["gap"]]
        if step < SETTLED:
            return []
        found = [judged(means, window) for judged in (_on_acceptance, _on_moves, _on_stuck)]
        return [text for text in (*found, self._on_gaps(means["spread"], step)) if text]

    def _on_gaps(self, spread: float, step: int) -> str | None:
        """On gaps that have grown over three windows, none of them of the first steps."""
        if step < 4 * SETTLED or len(self.gaps) < 3:
            return None
        first, second, third = self.gaps
        grows = min(second / first, third / second) > GROWTH if first and second else False
        if not grows or abs(third) < max(1.0, min(WIDE_GAP, SPREADS * spread or WIDE_GAP)):
            return None
        return (
            f"step {step}: the mean of U(x) - U(x-) was {first:.3g}, {second:.3g} and {third:.3g} "
            f"nats by steps {step // 4}, {step // 2} and {step}: it runs away, since chains do not "
            "come where the energy is lowered. Raise num_steps, start chains at the data, use "
            "PersistentContrastiveDivergence, or set energy_penalty"
        )


def _on_acceptance(means: dict[str, float], window: int) -> str | None:
    rate = means.get("acceptance", 1.0)
    if rate >= MIN_ACCEPTANCE:
        return None
    return (
        f"over the last {window} steps the kernel accepted {rate:.2%} of its proposals: chains "
        "stay where they are and the gradient means little. Use a smaller step size (without "
        "kernel= it is adapted) or a smoother energy"
    )


def _on_moves(means: dict[str, float], window: int) -> str | None:
    moved = means.get("moved", 1.0)
    if moved >= MIN_MOVE or means.get("acceptance", 1.0) < MIN_ACCEPTANCE:
        return None
    return (
        f"over the last {window} steps chains moved by {moved:.2%} of the data's standard "
        "deviation at a time: data are compared with near copies of themselves, and the gradient "
        "is mostly noise. Use a larger step size (without kernel= it follows the data) or raise "
        "num_steps"
    )


def _on_stuck(means: dict[str, float], window: int) -> str | None:
    share = means.get("stuck", 0.0)
    if share <= MAX_STUCK or means.get("acceptance", 1.0) < MIN_ACCEPTANCE:
        return None
    return (
        f"over the last {window} steps {share:.2%} of the chains had not moved in their last "
        f"{MANY_USES} uses or more: the energy learns to explain the points where they stand, "
        'which need not be near the data. Start chains at the data (start="data"), use a kernel '
        "with smaller steps (without kernel= some always are), or set restart_prob"
    )
