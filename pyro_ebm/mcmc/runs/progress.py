"""What the progress bar of a run says: acceptance, step size, divergences, running R-hat."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.ops.rank_rhat import rank_rhat

_EVERY = 0.25  # seconds
_MIN_DRAWS = 8  # of a chain, for R-hat
_SHOWN_CHAINS, _SHOWN_DRAWS = 64, 200  # of the R-hat in the bar, for ranking all takes long


class Progress:
    """Moves a bar on by one iteration at each call, and now and then renews its text.

    Args:
        bar: The bar, of ``tqdm``.
        phase: What is going on.
        kept_lp: Gives the log densities of the draws so far, ``(C, draws)``, where there are any.
    """

    def __init__(
        self, bar: Any, phase: str, kept_lp: Callable[[], Tensor | None] | None = None
    ) -> None:
        bar.set_description(phase)
        self.bar, self.kept_lp = bar, kept_lp
        self.divergences = 0
        self.shown = 0.0

    def __call__(self, state: State, info: Info) -> None:
        """Counts an iteration.

        Args:
            state: Where it has led.
            info: Its statistics.
        """
        self.bar.update()
        if self.bar.disable:
            return
        if "diverging" in info:
            self.divergences += int(info["diverging"].sum())
        now = time.perf_counter()
        if now - self.shown > _EVERY:
            self.shown = now
            self.bar.set_postfix_str(self._text(state, info), refresh=False)

    def _text(self, state: State, info: Info) -> str:
        parts = []
        if "acceptance_rate" in info:
            parts.append(f"acceptance {float(info['acceptance_rate'].mean()):.2f}")
        if "step_size" in state.tuning:
            parts.append(f"step {float(state.tuning['step_size'].median()):.2e}")
        if self.divergences:
            parts.append(f"divergences {self.divergences}")
        lp = None if self.kept_lp is None else self.kept_lp()
        if lp is not None and lp.shape[1] >= _MIN_DRAWS:
            shown = lp[:_SHOWN_CHAINS, :: -(-lp.shape[1] // _SHOWN_DRAWS)]
            parts.append(f"R-hat of lp {float(rank_rhat(shown.T)):.2f}")
        return ", ".join(parts)
