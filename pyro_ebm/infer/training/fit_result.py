"""What a fit leaves behind: curves, averages, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class FitResult:
    """What a fit leaves behind.

    Args:
        losses: Loss per datum in nats, one per step. A surrogate's value, not a likelihood.
        diagnostics: ``{"site/name": values}``, one value per step in which it was computed.
        diagnostic_steps: The steps, from 1, that these values belong to: not all where two players
            take turns.
        validation: ``(step, value)`` pairs: the criterion if there is one, else the loss per datum
            on the validation data.
        averaged: Exponential moving averages of the parameters by name, if asked for.
        num_steps: Steps done, over all runs that a checkpoint joins.
        seconds: Wall time of this run.
        interrupted: Whether Ctrl-C ended it early.
        best: ``(step, value)`` of the validation point whose parameters were restored; ``None``
            without ``patience``.
        stopped_early: Whether ``patience`` ended it.
        diverged: The first step at which the loss was found running away, ``None`` if it never was.
        parameters: What was optimized, by name: the live tensors, unconstrained.
    """

    losses: list[float] = field(default_factory=list)
    diagnostics: dict[str, list[float]] = field(default_factory=dict)
    diagnostic_steps: dict[str, list[int]] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)
    averaged: dict[str, Tensor] = field(default_factory=dict)
    num_steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    best: tuple[int, float] | None = None
    stopped_early: bool = False
    diverged: int | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def use_average(self) -> None:
        """Copies the averaged parameters into the live ones.

        Raises:
            ValueError: If the fit kept no average.
        """
        if not self.averaged:
            raise ValueError("no average was kept: fit(..., ema=0.999)")
        for name, value in self.averaged.items():
            self.parameters[name].copy_(value)
