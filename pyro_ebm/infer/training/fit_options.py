"""What a fit was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Options:
    """What ``fit`` was asked for; its docstring says what these are."""

    optim: Callable[..., torch.optim.Optimizer]
    lr: float
    lr_schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None
    ema: float | None
    grad_clip: float | None
    validation: tuple[Tensor, ...] | None
    criterion: Callable[[], Any] | None
    validate_every: int
    patience: int | None
    checkpoint: Path | None
    checkpoint_every: int
    disable_progbar: bool
    capture: bool = False
    compile: bool = False


def check_numbers(options: Options) -> None:
    """Raises ``ValueError`` for options out of range."""
    if not (options.lr > 0 and math.isfinite(options.lr)):
        raise ValueError(f"lr must be a positive number, got {options.lr!r}")
    if options.ema is not None and not 0 <= options.ema < 1:
        raise ValueError(
            f"ema must be in [0, 1), the weight of the average so far, got {options.ema!r}"
        )
    if options.grad_clip is not None and not options.grad_clip > 0:
        raise ValueError(
            f"grad_clip must be positive, the largest gradient norm, got {options.grad_clip!r}"
        )
    for name in ("validate_every", "checkpoint_every"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"{name} must be a positive number of steps, got {getattr(options, name)!r}"
            )
