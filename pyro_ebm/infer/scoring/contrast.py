"""What an objective compares data with: noise, draws of a base, or perturbed data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import MaskedDistribution, MultivariateNormal, Normal
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions.constraints import Constraint

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.distributions.layers import is_normalized
from pyro_ebm.distributions.supports import same_support

POSITIVE_AT_DATA = (
    "that is positive at all data (torch's Uniform excludes its upper end: dist.Beta(1.0, 1.0) has "
    "both ends of [0, 1], or let the support be wider than the data), or leave these rows out"
)


class Contrast(NamedTuple):
    """Draws of a law to compare a batch with.

    Objectives that need to know something else of their draws than the law's density have types of
    their own, with ``points`` of the same shape.

    Args:
        points: Shape ``(M,) + sample + batch + event``: M draws beside every datum.
        log_noise: The law's log density at the points in nats, shape ``(M,) + sample + batch``;
            ``None`` where it has none or the loss does without.
        log_noise_data: The same at the data, shape ``sample + batch``.
        between: Points between data and contrast, shaped as the data, where an objective penalizes
            slopes.
    """

    points: Tensor
    log_noise: Tensor | None = None
    log_noise_data: Tensor | None = None
    between: Tensor | None = None

    def with_data(self, x: Tensor) -> Tensor:
        """Returns data and draws for one call of the energy, ``(1 + M,) + sample + batch + event``.

        Args:
            x: The data, in the coordinates of the points.
        """
        return with_data(x, self.points)


def with_data(x: Tensor, points: Tensor) -> Tensor:
    """Returns data ``rows + event`` and draws ``(M,) + rows + event``, ``(1 + M,) + rows + event``.

    Example:
        >>> with_data(torch.zeros(2), torch.ones(3, 2)).shape
        torch.Size([4, 2])
    """
    return torch.cat([x.unsqueeze(0), points])


def gap(values: Tensor) -> Tensor:
    """Returns the data's values less the mean of their contrast's.

    Args:
        values: As energies of ``Contrast.with_data`` come, ``(1 + M,) + sample + batch``.

    Example:
        >>> gap(torch.tensor([[5.0], [1.0], [3.0]]))
        tensor([3.])
    """
    return values[0] - values[1:].mean(0)


@torch.no_grad()
def where_to_look(p: EnergyDistribution, x: Tensor) -> str:
    """Returns what to do about energies that are not finite, at data ``x`` or a contrast."""
    if p.base is not None and not isinstance(p, GeneralizedEBM):  # which has no density
        bad = ~p.base.log_prob(p.broadcast_value(x)).isfinite()
        if bad.any():
            return (
                f"The log density of the base is not finite in {int(bad.sum())} of {bad.numel()} "
                f"rows of the data: give a base {POSITIVE_AT_DATA}"
            )
    return (
        "Look for overflow in the energy at data or contrast, standardize the data, or lower the "
        "learning rate"
    )


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
        TypeError: If it is no distribution.
        ValueError: If there is no contrast, or its events or support are not those of the EBM.
    """
    law = p.base if noise is None else noise
    if law is None:
        raise ValueError(
            f"{who} has no contrast for {p!r}: give the distribution a base=, let the guide hold "
            "one (a sample site of the same name), or pass it to the objective"
        )
    if not isinstance(law, Distribution):
        raise TypeError(
            f"the contrast of {who} must be a distribution, got {type(law).__name__}; a flow that "
            "is a module is called to make one: flow()"
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
    """Strips masks, and what ``to_event`` puts around an EBM and its contrast alike.

    Of dims that one wrapper has made event dims, those of the EBM's events stay such. Also Pyro's
    wrapper of a flow of zuko, which can be called but not drawn from.
    """
    wanted = min(event_dim, len(law.event_shape))
    while isinstance(law, (MaskedDistribution, ZukoToPyro)) or (
        isinstance(law, Independent) and len(law.event_shape) > event_dim
    ):
        law = law.dist if isinstance(law, ZukoToPyro) else law.base_dist
    missing = wanted - len(law.event_shape)
    return Independent(law, missing) if missing else law


def _check_events(law: Any, p: EnergyDistribution, who: str) -> None:
    if law.event_shape != p.event_shape:
        raise ValueError(
            f"the contrast of {who} has event_shape {tuple(law.event_shape)}, the EBM "
            f"{tuple(p.event_shape)}; use to_event(n) to make them agree"
        )
    support = _support_of(law, who)
    if not same_support(p.support, support):
        raise ValueError(
            f"the contrast of {who} lives on {support}, the EBM on {p.support}: their supports "
            "must be the same, or the log ratio is not defined where only one of them has mass. "
            "Give noise= (NCE, nce_posterior) on its support, such as dist.Uniform, or a base there"
        )


def _support_of(law: Any, who: str) -> Constraint:
    """Its support; a flow of zuko has none, but its transform from x to z says where x lives."""
    try:
        return law.support
    except NotImplementedError as error:
        transform = getattr(law, "transform", None)
        if transform is None or not same_support(law.base.support, transform.codomain):
            raise ValueError(
                f"the contrast of {who}, {type(law).__name__}, has no support to compare with the "
                "EBM's: give its class a property support"
            ) from error
        return transform.domain


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


def location_and_scale(law: Any) -> tuple[Tensor, Tensor]:
    """Returns what makes a Gaussian anew by ``gaussian_at``, bit for bit."""
    return law.loc, law.scale if isinstance(law, Normal) else law.scale_tril


def gaussian_at(loc: Tensor, scale: Tensor) -> Any:
    """Returns a Gaussian by its mean and its standard deviation or Cholesky factor."""
    if loc.dim() == 0:
        return Normal(loc, scale)
    return MultivariateNormal(loc, scale_tril=scale)


def gaussian_of(mean: Tensor, covariance: Tensor) -> Any:
    """Returns a Gaussian by its moments: of a number, or of a vector."""
    if mean.dim() == 0:
        return Normal(mean, covariance.sqrt())
    return MultivariateNormal(mean, covariance)
