"""Letting Ctrl-C through between the steps of a training, where it can be gone on from.

Within a step a batch is taken, random numbers are drawn and counts have moved, while parameters
have not: what would be saved then is no point of the training.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Holds back the first Ctrl-C within a block until it is let through; a second acts at once.

    Signals come to the main thread alone. Elsewhere, and where Ctrl-C is ignored or handled
    outside of Python, nothing changes. Another handler than Python's own is called in its place.

    Example:
        >>> with Interrupts() as interrupts:
        ...     signal.raise_signal(signal.SIGINT)
        ...     print("the step is finished")
        ...     try:
        ...         interrupts.let_through()
        ...     except KeyboardInterrupt:
        ...         print("and the training ends")
        the step is finished
        and the training ends
    """

    def __init__(self) -> None:
        self._pending: tuple[int, FrameType | None] | None = None
        self._handler: Any = None

    def __enter__(self) -> Interrupts:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(signal.SIGINT, self._hold_back)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if error is None:
            self.let_through()

    def let_through(self) -> None:
        """Calls the handler that was in place, if there was a Ctrl-C since the last time.

        Raises:
            KeyboardInterrupt: By Python's own handler.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._handler(*pending)

    def _hold_back(self, number: int, frame: FrameType | None) -> None:
        is_second = self._pending is not None
        self._pending = (number, frame)
        if is_second:
            self.let_through()
