"""Sentences for models that cannot be set up: what is wrong, at which site, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform
from pyro.distributions.transforms import biject_to
from pyro.poutine.util import site_is_subsample

from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.ops.constraints import base_measure, plain

Remedy = tuple[str, str]


def explained(
    error: Exception, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Exception:
    """Returns an error of ours for a model that Pyro could not set up, or the one given.

    Args:
        error: What Pyro raised.
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    if "cannot find valid initial params" in str(error):
        return NonFiniteEnergyError(
            f"{name_of(model)}: no starting point of finite density was found. Look for NaN in the "
            "data (masked entries too must hold some number of the support), for data outside the "
            "support of their distribution, and for supports that depend on other latents; where "
            "the density is finite in a narrow region only, start in it: pass initial_params= to "
            "MCMC.run()"
        )
    if "subsample sites" in str(error):
        return TypeError(
            f"{name_of(model)}: a plate subsamples its data at random, and MCMC needs the same "
            "rows at every step: leave subsample_size= out, so that all rows count once (rows that "
            "are fixed by subsample= are counted several times)"
        )
    found = _remedy(model, args, kwargs)
    if found is None:
        return error
    site, remedy = found
    if site.endswith("_unobserved"):  # Pyro's name for what obs_mask= leaves out
        remedy = (
            "is latent by obs_mask= and cannot be sampled here: leave its rows out by "
            "poutine.mask(mask=obs_mask) around the site, which is the same posterior of all else"
        )
    said = first_line(_innermost(error))
    return TypeError(f"{name_of(model)}: site {site!r} {remedy}. The error said: {said}")


def _remedy(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first latent site that explains a failure, with what to do about it."""
    seen: list[Remedy] = []

    class Look(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: dict[str, Any]) -> None:
            drawn = not (msg["is_observed"] or site_is_subsample(msg))
            remedy = _of_site(msg["fn"]) if drawn else None
            if remedy is not None:
                seen.append((msg["name"], remedy))

    unchecked = pyro.validation_enabled(is_validate=False)
    with suppress(Exception), unchecked, poutine.block(), Look():  # the caller has the error
        model(*args, **kwargs)
    return seen[0] if seen else None


def _of_site(fn: Any) -> str | None:
    while hasattr(fn, "base_dist") and not isinstance(fn, ImproperUniform):
        fn = fn.base_dist
    if isinstance(fn, ImproperUniform):
        return (
            "is ImproperUniform, which cannot be drawn to start from: use a proper law that counts "
            "for nothing, such as dist.Normal(0.0, 1.0).mask(False)"
        )
    if isinstance(fn, Delta):
        return "is a latent Delta, which has no density: use pyro.deterministic"
    support = plain(fn.support)
    if support.is_discrete:
        return (
            f"lives on {plain(support)}, where there is no gradient to move along. Pyro sums "
            "discrete sites out by enumeration if their support is finite and the model allows for "
            "an extra batch dim on the left (no sizes written out, no to_event over plates). Else "
            "sum it out by hand, a mixture by MixtureSameFamily, or draw it by a kernel for its "
            "support; an EBM's own sample() has a small one"
        )
    if not _is_movable(support):
        return f"lives on {plain(support)}, to which no bijection leads from the real numbers"
    return None


def _is_movable(support: Any) -> bool:
    try:
        biject_to(support)
    except NotImplementedError:
        return False
    return base_measure(support) == "lebesgue"


def name_of(model: Any) -> str:
    """Returns what messages call a model: the user's function, whatever handlers are around it."""
    inner = poutine.unwrap(model)
    return f"model {getattr(inner, '__name__', type(inner).__name__)!r}"


def _innermost(error: BaseException) -> BaseException:
    """The error that others quote, as Pyro does with one of a site under a headline of its own."""
    cause = error.__cause__
    while cause is not None and str(cause) and str(cause) in str(error):
        error, cause = cause, cause.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Returns the beginning of an error's text, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
