"""Noticing that a training goes wrong: numbers that are not finite, and a loss that runs away.

The first end the training, before the optimizer could spread them. The second is a matter of
degree, so that it is reported once: a loss a thousand times its first size that still gains speed
is typical of an energy that falls without limit between data and contrast.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_ebm.errors import NonFiniteEnergyError, SurrogateWarning
from pyro_ebm.infer.training.stock_elbo import Loss, as_given

WINDOW = 50  # steps whose median is the size of the loss
AWAY = 1000.0


def check_loss(loss: float, step: int, objective: Loss) -> None:
    """Raises ``NonFiniteEnergyError`` if the loss is not finite though no EBM site said so."""
    if not math.isfinite(loss):
        sites = ", ".join(map(repr, objective.sites))
        where = f"EBM site {sites}: the" if sites else "the"
        who = type(as_given(objective)).__name__
        raise NonFiniteEnergyError(
            f"{where} loss of {who} is {loss} at step {step}. Look for overflow in the energy and "
            "at latents and their guide, or lower the learning rate"
        )


def check_gradients(parameters: Mapping[str, Tensor], step: int, objective: Loss) -> None:
    """Raises ``NonFiniteEnergyError``, naming parameter and site, if a gradient is not finite.

    The optimizer has not moved yet.
    """
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    if not grads or math.isfinite(torch.stack([g.sum().to(grads[0].device) for g in grads]).sum()):
        return
    for name, p in parameters.items():
        if p.grad is not None and not p.grad.isfinite().all():
            bad = int((~p.grad.isfinite()).sum())
            raise NonFiniteEnergyError(
                f"{_sites_of(p, objective)}: the gradient of {name!r} is not finite in {bad} of "
                f"{p.numel()} numbers at step {step}, though the loss is. Look for square roots or "
                "norms at zero and for overflow in the energy's slope, or lower the learning rate"
            )


def is_running_away(losses: Sequence[float]) -> bool:
    """Whether the loss is a thousand times its first size and its changes still grow.

    Args:
        losses: All so far, one per step. Looked at once every ``WINDOW`` steps.
    """
    if len(losses) % WINDOW or len(losses) < 3 * WINDOW:
        return False
    first = 1.0 + abs(statistics.median(losses[:WINDOW]))
    before, then, now = (
        statistics.median(losses[len(losses) - k * WINDOW :][:WINDOW]) for k in (3, 2, 1)
    )
    return abs(now) > AWAY * first and abs(now - then) > abs(then - before)


def warn_running_away(losses: Sequence[float], objective: Loss) -> None:
    """Says so, naming sites and step."""
    sites = ", ".join(map(repr, objective.sites)) or "none"
    warnings.warn(
        f"{type(as_given(objective)).__name__} at EBM sites {sites}: the loss per datum was "
        f"{losses[0]:.3g} and is {losses[-1]:.3g} at step {len(losses)}, still gaining speed: it "
        "runs away. Lower the learning rate, bound the energy (gradient_penalty, confinement, "
        "spectral norm) or choose a contrast that covers the data",
        SurrogateWarning,
        stacklevel=2,
    )


def are_finite(parameters: Mapping[str, Tensor]) -> bool:
    """Whether every parameter is."""
    return all(bool(p.detach().isfinite().all()) for p in parameters.values())


def _sites_of(parameter: Tensor, objective: Loss) -> str:
    """The EBM sites whose energy's module holds a parameter; else all that there are."""
    sites = objective.sites
    owners = [
        name
        for name, p in sites.items()
        if isinstance(p.energy_function, nn.Module)
        and any(parameter is own for own in p.energy_function.parameters())
    ]
    names = ", ".join(map(repr, owners or sites))
    return f"EBM site {names}" if names else "the model"
