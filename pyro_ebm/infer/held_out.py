"""Evaluating a criterion in the middle of a training without a trace of it in what follows.

Every point of a validation curve sees the same contrast draws, so that points differ by the
parameters alone; modules are in evaluation mode, so that dropout does not add noise and buffers
(running means, the vectors of spectral norms) stay those of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.ops.evaluation_mode import evaluation_mode
from pyro_ebm.ops.rng import rng_preserved

SEED = 20_231_113  # of the draws at every point


def held_out_loss(objective: Any, model: Any, guide: Any, data: tuple[Tensor, ...]) -> float:
    """Returns an objective's loss per datum in nats, leaving its diagnostics as they were."""
    kept = dict(getattr(objective, "diagnostics", {}))
    loss = objective.differentiable_loss(model, guide, *data)
    if kept:
        objective.diagnostics = kept
    return float(loss) / len(data[0])


@contextmanager
def held_out(modules: Collection[nn.Module]) -> Iterator[None]:
    """Surrounds the evaluation of a criterion: no gradients, the same draws, evaluation mode.

    Args:
        modules: Those that take part; each of their submodules returns to its own mode.
    """
    with torch.no_grad(), rng_preserved(), evaluation_mode(modules):
        torch.manual_seed(SEED)
        yield


def criterion_of(
    criterion: Callable[[], Any] | None,
    objective: Any,
    model: Any,
    guide: Any,
    data: tuple[Tensor, ...] | None,
) -> Callable[[], Any] | None:
    """Returns what a validation point evaluates: the user's criterion, else the held-out loss."""
    if criterion is not None or data is None:
        return criterion
    return lambda: held_out_loss(objective, model, guide, data)
