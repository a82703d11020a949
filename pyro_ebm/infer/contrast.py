"""What an objective compares data with: noise, draws of a base, or perturbed data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import MaskedDistribution, MultivariateNormal, Normal
from torch import Tensor
from torch.distributions import Independent

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.layers import is_normalized


class Contrast(NamedTuple):
    """Draws to compare a batch with.

    Args:
        points: Shape ``(M,) + sample + batch + event``: M draws beside every datum.
        log_noise: Their log density under the contrast in nats, shape ``(M,) + sample + batch``,
            where it has one.
        log_noise_data: The data's log density under the contrast, shape ``sample + batch``.
        between: Points between data and contrast, shaped as the data, where an objective penalizes
            slopes.
    """

    points: Tensor
    log_noise: Tensor | None = None
    log_noise_data: Tensor | None = None
    between: Tensor | None = None


def rows_of(p: EnergyDistribution, x: Tensor) -> torch.Size:
    """Returns the ``sample + batch`` shape of ``x``."""
    return x.shape[: x.dim() - len(p.event_shape)]


def contrast_law(
    noise: Any, p: EnergyDistribution, x: Tensor, *, needs_density: bool, who: str
) -> Any:
    """Returns the contrast's distribution, expanded to the rows of ``x`` and without masks.

    Args:
        noise: The guide's site or the objective's own choice; ``None`` takes the base of ``p``.
        p: The EBM.
        x: The data.
        needs_density: Whether the contrast must be normalized.
        who: The objective, for messages.

    Raises:
        ValueError: If there is no contrast, or its events or support are not those of the EBM.
    """
    law = p.base if noise is None else noise
    if law is None:
        raise ValueError(
            f"{who} has no contrast for {p!r}: give the distribution a base=, let the guide hold "
            "one (a sample site of the same name), or pass it to the objective"
        )
    law = elementwise(law, len(p.event_shape))
    _check_events(law, p, who)
    if needs_density and not is_normalized(law):
        raise ValueError(
            f"{who} needs a normalized contrast, got {law!r}, which is or holds an EBM with "
            "unknown log Z"
        )
    return law.expand(rows_of(p, x))


def elementwise(law: Any, event_dim: int) -> Any:
    """Strips masks, and what ``to_event`` puts around an EBM and its contrast alike."""
    while isinstance(law, MaskedDistribution) or (
        isinstance(law, Independent) and len(law.event_shape) > event_dim
    ):
        law = law.base_dist
    return law


def _check_events(law: Any, p: EnergyDistribution, who: str) -> None:
    if law.event_shape != p.event_shape:
        raise ValueError(
            f"the contrast of {who} has event_shape {tuple(law.event_shape)}, the EBM "
            f"{tuple(p.event_shape)}; use to_event(n) to make them agree"
        )
    if not p.shares_support_with(law):
        raise ValueError(
            f"the contrast of {who} lives on {law.support}, the EBM on {p.support}: their supports "
            "must be the same, or the log ratio is not defined where only one of them has mass"
        )


def fitted_gaussian(x: Tensor, event_dim: int) -> Any:
    """Returns a Gaussian with the mean and covariance of the rows of ``x``.

    Raises:
        ValueError: If there are no more rows than dimensions, or the events are no vectors or
            numbers.
    """
    if event_dim > 1:
        raise ValueError(
            f"noise='gaussian' fits numbers and vectors (event_dim 0 or 1), got {event_dim}"
        )
    if event_dim == 0:
        return gaussian_of(x.mean(), x.var())
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= rows.shape[1]:
        raise ValueError(
            "noise='gaussian' needs more rows than dimensions in its first batch, got "
            f"{tuple(rows.shape)}"
        )
    return gaussian_of(rows.mean(0), torch.cov(rows.T))


def gaussian_of(mean: Tensor, covariance: Tensor) -> Any:
    """Returns a Gaussian by its moments: of a number, or of a vector."""
    if mean.dim() == 0:
        return Normal(mean, covariance.sqrt())
    return MultivariateNormal(mean, covariance)
