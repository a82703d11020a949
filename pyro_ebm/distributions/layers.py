"""What plates, ``to_event``, masks, transforms and mixtures are made of, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from pyro.distributions import Delta, SineBivariateVonMises, VonMises
from torch import Tensor
from torch.distributions import Independent


def layers(fn: Any) -> Iterator[Any]:
    """Yields ``fn`` and what it wraps, from the outside in."""
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)


def unvalidated(law: Any) -> Any:
    """Returns a copy of a distribution, its base included, that does not check values.

    Float32 rounding takes points off a simplex by more than torch allows, and a check is a branch
    on values that no graph can follow.
    """
    unchecked = copy.copy(law)
    for part in ("base", "base_dist"):
        if getattr(law, part, None) is not None:
            setattr(unchecked, part, unvalidated(getattr(law, part)))
    unchecked._validate_args = False  # last: Pyro's Independent hands it on to what it wraps
    return unchecked


_PARTS = ("base_dist", "_component_distribution", "component0", "component1")


def parts(fn: Any) -> Iterator[Any]:
    """Yields ``fn`` and every distribution whose density enters its own, at any depth."""
    yield fn
    for name in _PARTS:
        if getattr(fn, name, None) is not None:
            yield from parts(getattr(fn, name))


def is_normalized(fn: Any) -> bool:
    """Whether a distribution's density is known: an EBM anywhere in it must know its log Z."""
    return all(getattr(part, "is_normalized", True) for part in parts(fn))


PERIODIC = "whose mass on the reals, its support as torch has it, is infinite"
"""What is wrong with a density that goes on beyond the one period that it draws from."""


def is_periodic(fn: Any) -> bool:
    """Whether a density repeats itself for ever, and sums to one on one period only.

    Example:
        >>> from pyro.distributions import Normal
        >>> is_periodic(VonMises(0.0, 1.0).expand([3]).to_event(1)), is_periodic(Normal(0.0, 1.0))
        (True, False)
    """
    return any(isinstance(part, (VonMises, SineBivariateVonMises)) for part in parts(fn))


def innermost(fn: Any) -> Any:
    """Returns what all layers wrap."""
    return list(layers(fn))[-1]


def is_point(fn: Any) -> bool:
    """Whether a law has all its mass at one point, as an estimate without spread has."""
    return isinstance(innermost(fn), Delta)


def mask_of(fn: Any, mask: Any = None) -> Tensor | bool:
    """Returns which elements of the innermost distribution count.

    Args:
        fn: A distribution with its layers.
        mask: What stands around it: ``None``, a bool, or a tensor over ``fn.batch_shape``.

    Returns:
        ``True``, ``False``, or a tensor that broadcasts with the innermost batch shape.
    """
    found: Tensor | bool = True if mask is None else mask
    for layer in layers(fn):
        own = getattr(layer, "_mask", None)
        if own is not None:
            found = found & own
        if isinstance(layer, Independent) and isinstance(found, Tensor):
            found = found.reshape(found.shape + (1,) * layer.reinterpreted_batch_ndims)
    return found


def num_reinterpreted(fn: Any) -> int:
    """Returns how many batch dims ``to_event`` has made event dims, over all layers."""
    kinds = (layer for layer in layers(fn) if isinstance(layer, Independent))
    return sum(layer.reinterpreted_batch_ndims for layer in kinds)
