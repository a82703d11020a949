"""Saying once that log Z was asked for where nothing is known of it."""

from __future__ import annotations

import warnings
from contextlib import suppress

from torch import Tensor


class Beyond:
    """Warns at the first parameters that draws tell nothing of.

    Args:
        where: What log Z was asked of, and what the draws are.
        advice: What to do instead.
    """

    def __init__(self, where: str, advice: str) -> None:
        self.where, self.advice = where, advice
        self.has_warned = False

    def look(self, held: Tensor) -> None:
        """Takes where log Z is known; under ``vmap`` nobody can tell."""
        if self.has_warned:
            return
        with suppress(RuntimeError):
            if not bool(held.all()):
                self.has_warned = True
                warnings.warn(
                    f"log Z was asked {self.where}, and is NaN there: chains that get there are "
                    f"stuck. {self.advice}, or mcmc.Exchange",
                    stacklevel=4,
                )
