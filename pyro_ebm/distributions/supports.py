"""Where an energy lives: support and event shape, from a base, an exact energy, or the user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from pyro_ebm.distributions.layers import PERIODIC, is_normalized, is_periodic, layers
from pyro_ebm.ops.constraints import event_support, finite_values, plain
from pyro_ebm.typing import is_tractable

# Sets that differ in boundary points only carry the same densities.
_KINDS = {
    type(constraints.positive): "above",
    type(constraints.nonnegative): "above",
    type(constraints.softplus_positive): "above",
    type(constraints.unit_interval): "between",
    type(constraints.half_open_interval(0, 1)): "between",
}


def resolve(
    energy: Any, base: Any, support: Any, event_shape: Any
) -> tuple[Constraint, torch.Size]:
    """Returns the support of an event and its shape.

    Raises:
        TypeError: If the base is not a distribution, the support not a constraint, or the shape
            not a tuple.
        ValueError: If nothing says what the event shape is, what is given contradicts the base, or
            the base has no density of finite mass on its support.
    """
    if support is not None and not isinstance(support, Constraint):
        raise TypeError(
            "support must be a constraint such as constraints.positive, "
            f"got {type(support).__name__}"
        )
    event_shape = None if event_shape is None else size_of("event_shape", event_shape)
    if base is not None:
        return _of_base(base, support, event_shape)
    return _of_energy(energy, support, event_shape)


def _of_energy(
    energy: Any, support: Constraint | None, event_shape: torch.Size | None
) -> tuple[Constraint, torch.Size]:
    if is_tractable(energy):
        event_shape = energy.event_shape if event_shape is None else event_shape
        support = energy.support if support is None else support
    if event_shape is None and support is None:
        raise ValueError(
            "EnergyDistribution needs base=, or support= and event_shape=, for an energy that does "
            "not know its own: for example EnergyDistribution(energy, event_shape=(2,)) for an "
            "energy on R^2"
        )
    event = torch.Size(()) if event_shape is None else event_shape
    return event_support(constraints.real if support is None else support, len(event)), event


def _of_base(
    base: Any, support: Constraint | None, event_shape: torch.Size | None
) -> tuple[Constraint, torch.Size]:
    _check_has_density(base)
    if event_shape is not None and event_shape != base.event_shape:
        raise ValueError(
            f"event_shape {tuple(event_shape)} does not match the base's "
            f"{tuple(base.event_shape)}; base.to_event(n) makes n batch dims part of the event"
        )
    if support is not None and not same_support(support, base.support):
        raise ValueError(f"support {support} does not match the base's {base.support}")
    return event_support(base.support, len(base.event_shape)), base.event_shape


def _check_has_density(base: Any) -> None:
    """Raises unless it is a distribution with a density; wrappers are looked into."""
    if not isinstance(base, Distribution):
        kind = base.__name__ if isinstance(base, type) else type(base).__name__
        raise TypeError(
            f"base must be a Pyro distribution, for example dist.Normal(0, 1), got {kind}"
        )
    for layer in layers(base):
        if getattr(layer, "base_measure", None) == "generator":
            raise ValueError(
                "a GeneralizedEBM has no density and cannot be a base: use base.tilt(energy)"
            )
    if is_periodic(base):
        raise ValueError(
            f"base {base!r} is periodic, {PERIODIC}: make its density a part of the energy, "
            "EnergyDistribution(lambda x: energy(x) - base.log_prob(x), event_shape=..., "
            "support=constraints.interval(-math.pi, math.pi))"
        )
    if not is_normalized(base):
        raise ValueError(
            "base must be normalized: use base.tilt(energy) to add an energy to an unnormalized "
            "distribution"
        )


def tensors_in(support: Any) -> Iterator[Tensor]:
    """Yields the tensors, such as bounds, that a support is made of."""
    if isinstance(support, Tensor):
        yield support
    elif isinstance(support, Constraint):
        for value in vars(support).values():
            yield from tensors_in(value)
    elif isinstance(support, (list, tuple)):
        for value in support:
            yield from tensors_in(value)


def size_of(name: str, shape: Any) -> torch.Size:
    """Returns a shape given as any sequence of integers.

    Raises:
        TypeError: If it is not one.
    """
    try:
        return torch.Size(shape)
    except TypeError as error:
        hint = f"; write ({shape},) for one dim" if isinstance(shape, int) else ""
        raise TypeError(f"{name} must be a tuple of integers, got {shape!r}{hint}") from error


def broadcast_batch(own: torch.Size, given: Any, whose: str) -> torch.Size:
    """Returns the batch shape that ``batch_shape=`` and the shape of a part broadcast to.

    Raises:
        ValueError: If they do not.
    """
    batch = size_of("batch_shape", given)
    if own == batch or not own:
        return batch
    try:
        return torch.broadcast_shapes(own, batch)
    except RuntimeError as error:
        raise ValueError(
            f"batch_shape {tuple(batch)} does not broadcast with the {whose}'s {tuple(own)}"
        ) from error


def check_observed(
    name: str,
    support: Constraint,
    x: Tensor,
    mask: Tensor | bool,  # noqa: FBT001
) -> None:
    """Raises if data that count lie outside of a distribution's support, or are NaN.

    Args:
        name: The site.
        support: The distribution's support.
        x: The data.
        mask: Which count, broadcasting with what the support says of ``x``.

    Raises:
        ValueError: If some do.
    """
    inside = support.check(x)
    outside = ~inside & torch.as_tensor(mask, device=inside.device)
    if not bool(outside.any()):
        return
    what = "are NaN" if bool(x.isnan().any()) else "lie outside of its support"
    raise ValueError(
        f"{int(outside.sum())} of {inside.numel()} data of EBM site {name!r} {what} "
        f"({plain(support)}): correct them, or leave them out by poutine.mask"
    )


def same_support(a: Constraint, b: Constraint) -> bool:
    """Whether two supports are the same set, up to boundary points.

    Example:
        >>> same_support(constraints.positive, constraints.nonnegative)
        True
        >>> same_support(constraints.boolean, constraints.integer_interval(0, 1))
        True
        >>> same_support(constraints.real, constraints.positive)
        False
    """
    a, b = plain(a), plain(b)
    if a is b:
        return True
    values_a, values_b = finite_values(a), finite_values(b)
    if values_a is not None and values_b is not None:
        return torch.equal(values_a, values_b)
    return _kind(a) == _kind(b) and _all_equal(vars(a), vars(b))


def _kind(support: Constraint) -> Any:
    return _KINDS.get(type(support), type(support))


def _all_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Constraint) and isinstance(b, Constraint):
        return same_support(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _equal_tensors(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu())
    return bool(a == b)


def _equal_tensors(a: Tensor, b: Tensor) -> bool:
    try:
        return bool((a == b).all())
    except RuntimeError:  # shapes that do not broadcast
        return False
