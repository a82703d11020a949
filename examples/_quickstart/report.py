"""Text for the screen that is also kept, to be written to a file at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from pyro_ebm.chains import MMDInterval


class Report:
    """Prints lines beside progress bars and remembers them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: object = "") -> None:
        """Prints and keeps ``str(text)``."""
        self.lines.append(str(text))
        tqdm.write(str(text))

    def heading(self, text: str) -> None:
        """Prints an underlined line."""
        self(f"\n{text}\n{'-' * len(text)}")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints rows under their header, in columns; the first is aligned to the left."""
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            first, *others = row
            cells = [f"{c:>{w}}" for c, w in zip(others, widths[1:], strict=True)]
            self("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())

    def save(self, path: Path) -> None:
        """Writes all lines to a file."""
        path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def verdict(gain: MMDInterval) -> str:
    """Says in words what an interval of a gain says."""
    if not gain.excludes_zero:
        return "no difference shown"
    return "better" if gain.value > 0 else "WORSE"


def table_cell(interval: MMDInterval, unit: float = 1e-3) -> str:
    """Returns ``value [lower, upper]`` in multiples of ``unit``, all of one width."""
    value, lower, upper = (x / unit for x in (interval.value, interval.lower, interval.upper))
    return f"{value:6.2f} [{lower:6.2f}, {upper:6.2f}]"
