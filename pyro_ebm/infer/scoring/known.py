"""What an objective may take for log Z of a site, and what that log Z depends on."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.known_normalizer import check_broadcasts


def covers_parameters(p: EnergyDistribution, *, learned: bool = False) -> bool:
    """Whether the site's own log Z holds for all parameters: a function, or a tensor with a graph.

    A constant is log Z at one set of parameters; learning with it would bend the energy until it
    fits. Without grad mode no tensor has a graph: it is then believed unless log Z was ``learned``
    before.
    """
    given = p.log_normalizer
    if not isinstance(given, Tensor):
        return callable(given)
    return given.requires_grad or not (torch.is_grad_enabled() or learned)


def log_normalizer_of_rows(p: EnergyDistribution, x: Tensor) -> Tensor | None:
    """Returns the site's own log Z in nats, one value for all rows of ``x`` or one for each.

    Raises:
        EnergyShapeError: If it has other dims. Draws of a contrast stand in front of the rows, and
            a log Z of shape ``(N, 1)`` would be taken for one value per draw.
    """
    value = p.log_normalizer_value()
    if value is not None:
        check_broadcasts(value.shape, x.shape[: x.dim() - len(p.event_shape)])
    return value


def shared_with_store(name: str, value: nn.Parameter) -> Tensor:
    """Registers ``value``; where the store was loaded from a file, takes over what it says."""
    store = pyro.get_param_store()
    if name in store and store[name] is not value:
        with torch.no_grad():
            value.copy_(store[name])
        store[name] = value
    return pyro.param(name, value)
