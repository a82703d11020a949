r"""The pointwise log likelihood of a model's data under every draw, and when it means something.

For rows :math:`y_i` of a data site, leave-one-out cross-validation and model comparison use
:math:`\log p(y_i \mid \theta_s)` at all draws :math:`\theta_s`. That has a meaning only if

* the density is normalized *at every draw*: without :math:`\log Z(\theta_s)` the results are wrong
  by many nats while their own diagnostics stay green;
* the rows are exchangeable observations: one lattice, graph or series has none to leave out;
* the posterior holds every row once: of draws under a power w of the likelihood a row is taken out
  by :math:`p(y_i \mid \theta_s)^{-w}`, and ArviZ takes w = 1.

Where log Z is estimated, as a constant or by a function made of draws that are held, its error is
the same in every row. It enters the sum over n rows n times, and the standard errors of LOO, which
compare rows, not at all: so it is told apart from them, by resampling what is held.

References:
    Vehtari, Gelman, Gabry, Practical Bayesian model evaluation using leave-one-out cross-validation
    and WAIC, Statistics and Computing 27, 2017. arXiv:1507.04544.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_ebm.chains.constant_estimates import (
    ConstantEstimate,
    constant_estimates,
    total_error,
    varying_error_at,
)
from pyro_ebm.chains.observations import Conditioned, Site, check_leaves_rows_out
from pyro_ebm.chains.per_draw import at_all_draws
from pyro_ebm.chains.record import to_numpy
from pyro_ebm.distributions import unwrap
from pyro_ebm.distributions.layers import layers, mask_of, num_reinterpreted
from pyro_ebm.distributions.normalizer_guard import report
from pyro_ebm.ops.held_draws import HeldDraws, asked, replicated
from pyro_ebm.ops.rng import rng_preserved

__all__ = ["PointwiseLogLikelihood", "pointwise_log_likelihood"]

MAX_MCSE_LOG_Z = 0.5
"""Nats of error in an elpd that pass without a word: differences below 4 tell little anyway."""

_CHUNK = 500
_NUM_CHECKED = 20
_UNREACHED = "resampled draws do not reach all of the posterior"
_NUM_REPLICATES, _NUM_REEVALUATED = 50, 50  # of the functions for log Z, draws of the posterior


class PointwiseLogLikelihood(NamedTuple):
    """The log likelihood of rows, and what log Z adds to the error of its sum.

    Args:
        values: Site name to nats, ``(S,) + rows``.
        mcse_log_z: Monte Carlo error in nats that log Z gives the sum over all rows and sites, a
            mean over draws: the same, to first order, as that of LOO's elpd. ``None`` where log Z
            is no estimate, NaN where the error is unknown.
    """

    values: dict[str, NDArray[Any]]
    mcse_log_z: float | None


def pointwise_log_likelihood(
    conditioned: Conditioned, names: Sequence[str] | None = None
) -> PointwiseLogLikelihood:
    r"""Returns :math:`\log p(y_i\mid\theta_s)` in nats, of shape ``(S,) + rows``, for every site.

    Rows that a mask hides are no observations and are left out, which flattens the rows of their
    site. Draws are evaluated in batches behind an outer plate, twenty of
    them also singly as a check; a model that does not allow that is run draw by draw.

    Args:
        conditioned: The model with its draws.
        names: The data sites wanted; all of them if ``None``.

    Raises:
        MissingNormalizerError: If a site's density is not normalized at every draw.
        ValueError: If a latent site has no draws, a site is unknown, a plate is subsampled, or a
            site is scaled or holds a single observation.

    Warns:
        UserWarning: If log Z is an estimate and adds more than :data:`MAX_MCSE_LOG_Z` to the error
            of the sum, or nobody knows how much, or the estimate is not to be trusted.
    """
    with asked() as functions:  # in the model itself
        trace = _differentiable_trace(conditioned)
    sites = conditioned.data_sites(trace)
    wanted = list(sites) if names is None else list(names)
    if unknown := [name for name in wanted if name not in sites]:
        raise ValueError(f"log_likelihood: no data at {unknown}; the data sites are {list(sites)}")
    check_leaves_rows_out(trace, wanted)
    for name in wanted:
        _check_normalized(name, sites[name])
    if any(_energy_based(sites[name]["fn"]) is not None for name in wanted):
        _check_absolute(functions)
    functions += _score_and_check_covered(conditioned, trace, wanted)
    for name in wanted:
        _check_rows(name, sites[name])
    layouts = [_layout(name, sites[name]) for name in wanted]
    scores = _evaluate(conditioned, trace, layouts, num_checked=_NUM_CHECKED)
    values = {name: to_numpy(x) for name, x in zip(wanted, scores, strict=True)}
    constants = _constants(conditioned, trace, wanted)
    if doubts := [doubt for one in constants for doubt in one.doubts]:
        warnings.warn(f"log_likelihood: {'; '.join(doubts)}: estimate it better", stacklevel=4)
    off = varying_error_at(conditioned, wanted)
    if not functions and not off and not any(one.error for one in constants):
        return PointwiseLogLikelihood(values, None)
    known = math.hypot(total_error(constants), off)
    error = _mcse_log_z(conditioned, trace, layouts, functions, known)
    return PointwiseLogLikelihood(values, error)


# What is refused


def _differentiable_trace(conditioned: Conditioned) -> Any:
    values = conditioned.values(0)
    leaves = {name: v.clone().requires_grad_(v.is_floating_point()) for name, v in values.items()}
    with torch.enable_grad():
        return conditioned.trace(leaves)


def _check_normalized(name: str, site: Site) -> None:
    ebm = _energy_based(site["fn"])
    if ebm is None or ebm.is_normalized:
        return
    report(
        f"log_likelihood: site {name!r} has an unnormalized density. Its log Z is needed at every "
        "draw: without it LOO, compare and evidence mean nothing, although their diagnostics look "
        "fine. Give the distribution a log_normalizer that is a function of its parameters, or "
        "check the model by posterior prediction"
    )


def _check_absolute(functions: Sequence[HeldDraws]) -> None:
    if any(function.is_relative for function in functions):
        report(
            "log_likelihood: log Z of an EBM site is known up to a constant only, and LOO would be "
            "off by it for every row: give Anchored its log_normalizer, log Z at the first anchor"
        )


def _energy_based(fn: Any) -> Any:
    """Returns the part of ``fn`` that says whether it is normalized, if it has one."""
    found = unwrap(fn)
    if found is not None:
        return found
    return next((layer for layer in layers(fn) if hasattr(layer, "is_normalized")), None)


def _score_and_check_covered(
    conditioned: Conditioned, trace: Any, names: Sequence[str]
) -> list[HeldDraws]:
    """Scores the data at one draw and differentiates: a log Z that ignores a latent raises.

    Returns the functions for log Z that were asked.
    """
    with torch.enable_grad(), asked() as functions:
        trace.compute_log_prob(site_filter=lambda name, _: name in names)
        total = torch.stack([trace.nodes[name]["log_prob_sum"] for name in names]).sum()
    latents = [site["value"] for name, site in trace.nodes.items() if name in conditioned.draws]
    leaves = [value for value in latents if value.requires_grad]
    if leaves and total.requires_grad:
        torch.autograd.grad(total, leaves, allow_unused=True)
    _check_absolute(functions)
    return functions


def _check_rows(name: str, site: Site) -> None:
    rows = site["unscaled_log_prob"].shape
    if rows.numel() <= 1:
        raise ValueError(
            f"log_likelihood: site {name!r} has batch_shape {tuple(rows)}: it is one observation, "
            "whose parts are not exchangeable, so nothing can be left out. Check it by posterior "
            "prediction, name other sites as log_likelihood=[...], or put independent rows into a "
            "plate"
        )


# What is computed


class _Layout(NamedTuple):
    """A data site, the shape of its rows, and which of them are observed (all if ``None``)."""

    name: str
    rows: torch.Size
    observed: Tensor | None

    def pick(self, trace: Any, num_draws: int) -> Tensor:
        values = trace.nodes[self.name]["unscaled_log_prob"]
        if values.dim() <= len(self.rows):  # did not depend on the draws
            values = values.expand(num_draws, *self.rows)
        values = values.reshape(num_draws, *self.rows)
        return values if self.observed is None else values[:, self.observed]


def _layout(name: str, site: Site) -> _Layout:
    """A row is observed if anything in it is: what is hidden adds nothing to its log density."""
    rows = site["unscaled_log_prob"].shape
    mask = mask_of(site["fn"], site["mask"])
    if mask is True:
        return _Layout(name, rows, None)
    parts = site["fn"].event_shape[: num_reinterpreted(site["fn"])]
    counts = torch.as_tensor(mask).cpu().expand(rows + parts)
    return _Layout(name, rows, counts.reshape(*rows, -1).any(-1))


def _evaluate(
    conditioned: Conditioned, like: Any, layouts: list[_Layout], *, num_checked: int
) -> tuple[Tensor, ...]:
    names = [one.name for one in layouts]

    def read(trace: Any, num_draws: int) -> tuple[Tensor, ...]:
        trace.compute_log_prob(site_filter=lambda name, _: name in names)
        return tuple(one.pick(trace, num_draws) for one in layouts)

    with torch.no_grad(), pyro.validation_enabled(is_validate=False):
        return at_all_draws(conditioned, like, read, chunk=_CHUNK, num_checked=num_checked)


# What log Z adds to its error


def _constants(
    conditioned: Conditioned, trace: Any, names: Sequence[str]
) -> tuple[ConstantEstimate, ...]:
    def at_last_draw() -> dict[str, Site]:
        with torch.no_grad():
            return conditioned.trace(conditioned.values(-1)).nodes

    return constant_estimates({name: trace.nodes[name] for name in names}, at_last_draw)


def _mcse_log_z(
    conditioned: Conditioned,
    like: Any,
    layouts: list[_Layout],
    functions: Sequence[HeldDraws],
    known: float,
) -> float:
    """The error of the mean total by held draws and all else; NaN, with a warning, if unknown."""
    if known != known:  # which is one of the doubts of an estimate
        return known
    try:
        spread = _spread(conditioned, like, layouts, functions) if functions else 0.0
        error, why = math.hypot(known, spread), _UNREACHED
    except ValueError as problem:
        error, why = float("nan"), str(problem)
    if not error <= MAX_MCSE_LOG_Z:
        warnings.warn(_said_of(error, why), stacklevel=5)
    return error


def _spread(
    conditioned: Conditioned, like: Any, layouts: list[_Layout], functions: Sequence[HeldDraws]
) -> float:
    """The spread of the mean total, were the draws behind log Z others.

    Raises:
        ValueError: If a function has too few draws to be resampled.
    """
    some = conditioned.thinned(_NUM_REEVALUATED)

    def mean_total() -> Tensor:
        scores = _evaluate(some, like, layouts, num_checked=1)
        return torch.stack([x.double().flatten(1).sum(1).mean() for x in scores]).sum()

    with rng_preserved():
        return float(replicated(mean_total, functions, _NUM_REPLICATES).std())


def _said_of(error: float, why: str) -> str:
    if error != error:
        return (
            "log_likelihood: log Z is an estimate, whose error is in elpd differences and not in "
            f"their dse, and its size is unknown: {why}"
        )
    return (
        "log_likelihood: log Z is an estimate, whose error moves the elpd by about "
        f"{error:.2g} nats (elpd_mcse_logz). It is the same in every row, so that neither se nor "
        f"dse holds it: compare no differences below {2 * error:.2g} nats; raise num_draws, "
        "num_samples or num_nodes of the estimate"
    )
