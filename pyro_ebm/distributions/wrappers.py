"""Finding the energy-based distribution that plates, ``to_event`` and masks have wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch.distributions import Independent

from pyro_ebm.distributions.energy_distribution import EnergyDistribution

_WRAPPERS = (ExpandedDistribution, MaskedDistribution, Independent)


def unwrap(fn: Any) -> EnergyDistribution | None:
    """Returns the :class:`EnergyDistribution` inside ``fn``, or ``None`` if there is none.

    A distribution *transformed* from an EBM is not that EBM: its values are others.

    Args:
        fn: A distribution, possibly wrapped by ``expand``, ``to_event`` or ``mask``.

    Example:
        >>> ebm = EnergyDistribution(lambda x: x**2, event_shape=())
        >>> unwrap(ebm.expand([3]).to_event(1).mask(True)) is not None
        True
    """
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn if isinstance(fn, EnergyDistribution) else None


def rewrap(fn: Any, replace: Callable[[EnergyDistribution], Any]) -> Any:
    """Returns ``fn`` with the EBM inside replaced and ``Independent`` and mask layers rebuilt."""
    if isinstance(fn, EnergyDistribution):
        return replace(fn)
    inner = rewrap(fn.base_dist, replace)
    if isinstance(fn, MaskedDistribution):
        return MaskedDistribution(inner, fn._mask)
    if isinstance(fn, Independent):
        return inner.to_event(fn.reinterpreted_batch_ndims)
    return inner.expand(fn.batch_shape)
