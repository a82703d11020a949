"""Log Z where nothing is known of it: NaN with its slope, and a warning."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import Tensor

from pyro_ebm.ops.powers_of_two import is_power_of_two


class Beyond:
    """What is said of parameters that draws tell nothing of.

    Args:
        where: What log Z was asked of, and what the draws are.
        advice: What to do instead.
    """

    def __init__(self, where: str, advice: str) -> None:
        self.where, self.advice = where, advice
        self.num_times = 0

    def told(self, value: Tensor, held: Tensor) -> Tensor:
        """Returns the value where it is known, else NaN.

        A product, for ``torch.where`` would let the slope of all else through: that of an energy
        without log Z.

        Args:
            value: Log Z.
            held: Where it is known.
        """
        self.look(held)
        return value * torch.where(held, 1.0, torch.nan)

    def look(self, held: Tensor) -> None:
        """Takes where log Z is known; under ``vmap`` nobody can tell."""
        with suppress(RuntimeError):
            if bool(held.all()):
                return
            self.num_times += 1
            if is_power_of_two(self.num_times):  # again in another run, and no flood
                warnings.warn(
                    f"log Z was asked {self.where}, and is NaN there with its slope: chains that "
                    f"get there are stuck, and SVI ends in NaN. {self.advice}, or mcmc.Exchange; "
                    "let chains and guides start where it is known",
                    stacklevel=5,
                )
