"""Diagnostics of a step: some are computed when they are first read, which is seldom.

Most steps of a training are looked at by nobody, and a diagnostic may cost as much as the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

Note = Tensor | Callable[[], Tensor]


class _Later:
    """A diagnostic that is computed once, when it is asked for; then only its value is kept."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._found: Note = compute

    def value(self) -> Tensor:
        if not isinstance(self._found, Tensor):
            with torch.no_grad():
                self._found = self._found()
        return self._found


class Notes(Mapping[str, Tensor]):
    """Diagnostics by name, detached 0-d tensors; copies hold the values.

    Args:
        values: Tensors, or functions that return them from what does not change any more.

    Example:
        >>> notes = Notes({"accuracy": lambda: torch.tensor(0.5)})
        >>> notes["accuracy"], "log_z" in notes
        (tensor(0.5000), False)
    """

    def __init__(self, values: Mapping[str, Note] | None = None) -> None:
        self._values: dict[str, Tensor | _Later] = {}
        for name, value in (values or {}).items():
            self.add(name, value)

    def add(self, name: str, value: Note) -> None:
        """Keeps a diagnostic, in place of one of the same name."""
        self._values[name] = value if isinstance(value, Tensor) else _Later(value)

    def after(self, older: Mapping[str, Tensor]) -> Notes:
        """Returns these, and of the older ones those that have other names."""
        both = Notes()
        both._values = {**(older._values if isinstance(older, Notes) else older), **self._values}
        return both

    def __getitem__(self, name: str) -> Tensor:
        value = self._values[name]
        return value.value() if isinstance(value, _Later) else value

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[type[Notes], tuple[dict[str, Tensor]]]:
        return Notes, (dict(self),)
