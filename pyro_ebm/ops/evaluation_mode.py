"""Modules in evaluation mode for a while, each part back in its own mode afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(modules: Collection[nn.Module]) -> Iterator[None]:
    """Surrounds a run that must not move running statistics, nor be noisy by dropout."""
    parts = [part for module in modules for part in module.modules()]
    modes = [part.training for part in parts]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
