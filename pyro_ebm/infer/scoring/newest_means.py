"""Means of an objective's diagnostics over its newest steps, which judge better than one step does.

Of 64 weights of one batch the largest may happen to count for all, where the next batch is fine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

NUM_STEPS = 16


class NewestMeans:
    """The diagnostics of the newest ``NUM_STEPS`` steps at one site.

    Example:
        >>> means = NewestMeans()
        >>> for value in (1.0, 2.0):
        ...     means.see({"bound": torch.tensor(value)})
        >>> means.mean("bound"), means.mean("weight_ess")
        (1.5, nan)
    """

    def __init__(self) -> None:
        self.steps: deque[Mapping[str, Tensor]] = deque(maxlen=NUM_STEPS)

    def see(self, notes: Mapping[str, Tensor]) -> None:
        """Takes note of a step, its detached 0-d tensors by name."""
        self.steps.append(notes)

    def mean(self, name: str) -> float:
        """Returns the mean of those steps that have the diagnostic; NaN where none has."""
        values = [notes[name].double() for notes in self.steps if name in notes]
        return float(torch.stack(values).mean()) if values else math.nan
