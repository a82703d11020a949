"""Whether data and contrast are told apart without error, judged on enough rows.

One batch may be a handful of rows, of which all are told right every now and then. So the newest
steps are looked at together, as many as make ``MIN_ROWS``: where one row in 30 is told wrong,
100 rows in a row are told right in one case of 30.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_ROWS = 100


@dataclass
class Separation:
    """The accuracies of the newest steps at one site.

    Args:
        steps: Rows, diagnostics and the names of accuracies of each, the newest last.
        num_rows: Rows of all of them.

    Example:
        >>> separation, right = Separation(), {"accuracy": torch.tensor(1.0)}
        >>> separation.see(right, 60)
        >>> separation.is_complete()
        False
        >>> separation.see(right, 60)
        >>> separation.is_complete()
        True
    """

    steps: deque[tuple[int, Mapping[str, Tensor], list[str]]] = field(default_factory=deque)
    num_rows: int = 0

    def see(self, notes: Mapping[str, Tensor], num_rows: int) -> None:
        """Takes note of a step; tensors are looked at when it is asked, which is seldom.

        Args:
            notes: ``accuracy``, or ``accuracy_1``, ... where there are several comparisons.
            num_rows: Rows in it.
        """
        each = [name for name in notes if name.startswith("accuracy_")]
        found = each or [name for name in notes if name == "accuracy"]
        if not found:
            return
        self.steps.append((num_rows, notes, found))
        self.num_rows += num_rows
        while self.num_rows - self.steps[0][0] >= MIN_ROWS:
            self.num_rows -= self.steps.popleft()[0]

    def is_complete(self) -> bool:
        """Whether one of the comparisons had no error in the newest rows, and they are enough."""
        if self.num_rows < MIN_ROWS:
            return False
        accuracies = torch.stack([_picked(notes, names) for _, notes, names in self.steps])
        return bool((accuracies == 1.0).all(0).any())


def _picked(notes: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.stack([notes[name] for name in names])
