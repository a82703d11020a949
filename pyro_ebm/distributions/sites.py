r"""Energies as factors: terms of a *globally* normalized density.

``energy_factor("f", E, x, y)`` multiplies the model's joint density by :math:`e^{-E(x, y)}`. The
whole is normalized once, over every latent. ``pyro.sample("x", EnergyDistribution(E))`` is
normalized on its own, given its parents. The two differ by a :math:`Z(\theta)` as soon as :math:`E`
depends on a parent: the first is a Markov random field, the second a Bayesian network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_ebm.distributions import guard_schedule, normalizer_guard
from pyro_ebm.distributions.call_stack import given_to_predictive
from pyro_ebm.errors import EnergyShapeError

_warned: set[str] = set()


def energy_factor(
    name: str, energy: Callable[..., Tensor], *inputs: Tensor, joint: bool = False
) -> None:
    """Adds minus ``energy(*inputs)`` to the model's log density.

    Args:
        name: Name of the factor site.
        energy: Returns nats, one value per element of the enclosing plates.
        *inputs: The values it scores. Latents among them may be inferred through the factor.
        joint: Say ``True`` if parameters that are not inputs are to be inferred through the
            unnormalized joint density.

    Raises:
        MissingNormalizerError: In the backward pass, unless ``joint``: if a trained parameter would
            be learned through the factor, or if no input is latent and a latent would be inferred
            through it.
        TypeError: If the energy is not callable, or an input or the result is not a tensor.
        EnergyShapeError: If the result has one dim more than the enclosing plates.

    Warns:
        UserWarning: Once, if ``Predictive`` draws an input of the factor from the prior: a
            simulation ignores factors.

    Example:
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     y = pyro.sample("y", dist.Normal(0.0, 1.0))
        ...     energy_factor("close", lambda x, y: 50.0 * (x - y) ** 2, x, y)
        >>> trace = pyro.poutine.trace(model).get_trace()
        >>> trace.nodes["close"]["infer"]["energy_factor"]
        True
    """
    _check_kinds(name, energy, inputs)
    cut = tuple(x.view_as(x) if x.requires_grad else x for x in inputs)
    value = energy(*cut)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"energy_factor {name!r}: energy returned {type(value).__name__}, expected a tensor of "
            "nats"
        )
    _check_shape(name, value)
    values = _values_so_far()
    turn = None if joint else guard_schedule.turn_of(energy, None, value, None, site=name)
    if turn is not None:
        # MCMC conditions the model on its latents: what tells them from data is that they carry
        # gradients; enumerated ones carry none, but are not observed either
        latents = {site: v for site, (v, _) in values.items() if v.requires_grad}
        free = [v for v, observed in values.values() if not observed]
        of_latents = any(x.requires_grad or any(x is v for v in free) for x in inputs)
        normalizer_guard.watch_factor(
            value,
            cut,
            normalizer_guard.Place(energy, name),
            latents,
            of_latents=of_latents,
            done=turn,
        )
    _warn_if_simulating(name, [site for site, (_, observed) in values.items() if not observed])
    unit = dist.Unit(-value)
    about = {"energy_factor": True, "factor_inputs": inputs, "joint": joint}
    pyro.sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True, **about})


def _check_kinds(name: str, energy: Any, inputs: tuple[Any, ...]) -> None:
    if not callable(energy):
        raise TypeError(
            f"energy_factor {name!r}: energy must be callable, (*inputs) -> nats, "
            f"got {type(energy).__name__}"
        )
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"energy_factor {name!r}: inputs must be tensors, got {type(x).__name__}"
            )


def _check_shape(name: str, value: Tensor) -> None:
    """Raises where a trailing 1 would be broadcast over a plate whose elements stand to its left.

    Such a value has dims that no plate accounts for; Pyro notices under an ELBO, not under MCMC.
    """
    plates = _plate_shape()
    if plates.numel() > 1 and value.shape == plates + (1,) and plates[-1] > 1:
        raise EnergyShapeError(
            f"energy_factor {name!r}: energy returned shape {tuple(value.shape)} inside plates of "
            f"shape {tuple(plates)}; expected one value per element. Did you forget .squeeze(-1)?"
        )


def _plate_shape() -> torch.Size:
    """The shape of the vectorized plates around this statement."""
    plates = [h for h in _PYRO_STACK if isinstance(h, IndepMessenger) and h.dim is not None]
    shape = [1] * -min((h.dim for h in plates), default=0)
    for plate in plates:
        shape[plate.dim] = getattr(plate, "subsample_size", plate.size)
    return torch.Size(shape)


def _values_so_far() -> dict[str, tuple[Tensor, bool]]:
    """Sample sites so far in the innermost trace: values, and whether they are observed."""
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, TraceMessenger) and not handler.param_only:
            sites = handler.trace.nodes.items()
            return {
                name: (site["value"], site["is_observed"])
                for name, site in sites
                if _is_sample(site)
            }
    return {}


def _is_sample(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and isinstance(site["value"], Tensor)


def _warn_if_simulating(name: str, latents: list[str]) -> None:
    if name in _warned or torch.is_grad_enabled():
        return
    given = given_to_predictive()
    if given is None or all(site in given for site in latents):
        return
    _warned.add(name)
    warnings.warn(
        f"energy_factor {name!r} is ignored when its inputs are simulated from the prior: "
        "condition on draws of MCMC (posterior_samples=) to respect it",
        UserWarning,
        stacklevel=3,
    )
