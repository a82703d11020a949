r"""What the Monte Carlo error of an anchored log Z adds to the error of a posterior's summaries.

A posterior through :math:`\log \hat Z` from draws at anchors is exact for a slightly wrong
likelihood. Draws of the anchors that are resampled chain by chain give functions :math:`\log \hat
Z_b`, and draws :math:`\theta_s` of the posterior get the weights

.. math:: w_{bs} \propto e^{-n (\log \hat Z_b(\theta_s) - \log \hat Z(\theta_s))}.

The spread over b of a weighted mean, standard deviation or quantile is the part of its error that
comes from the anchors: ``mcse_logz``. It does not fall when chains are run longer, and stands
beside ``mcse_mean``, which does. A constant in log Z cancels.

Reference:
    Geyer, On the convergence of Monte Carlo maximum likelihood calculations, JRSS B 56, 1994 (the
    error of an estimate through a Monte Carlo log Z).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_ebm.chains.record import Record, as_record, to_numpy
from pyro_ebm.normalizers.displacement import MIN_SHARE
from pyro_ebm.ops.arguments import probability, whole

MIN_ESS = 100.0
"""Effective draws of a reweighted posterior below which its shift is understated."""

_FURTHER = 1.4
"""From a median to the 1 % quantile, in steps to the 5 % quantile: that of a Gaussian."""

MIN_ESS_SHARE = 0.1
"""The same as a share of the draws: about one and a half posterior standard deviations off."""

Naturals = Callable[[dict[str, Tensor]], Tensor]


class Resampled(Protocol):
    """Log Z as a function, from draws that can be resampled."""

    @property
    def num_parameters(self) -> int:
        """The number p of parameters."""

    def __call__(self, natural: Tensor, /) -> Tensor:
        """Returns log Z in nats, ``(...)`` for parameters ``(..., p)``."""

    def changes(self, natural: Tensor, num_replicates: int, /) -> Tensor:
        """Returns by how much log Z of resampled draws differs, ``(num_replicates, ...)``."""

    def share(self, natural: Tensor, /) -> Tensor:
        """Returns the share of draws that count, ``(...)``; log Z is NaN below a least one."""


@dataclass(frozen=True, eq=False)
class AnchorError:
    """The error that log Z adds, by site and summary.

    Args:
        mcse: Site name to the error of ``"mean"``, ``"sd"`` and quantiles such as ``"q05"``, each
            of the site's event shape.
        ess: Effective draws of the reweighted posterior, of each replicate.
        num_draws: Draws that were reweighted.
        least_share: The share of what log Z is made of that counts at the posterior's worst
            hundredth, as those nearer to its middle foretell it.
    """

    mcse: dict[str, dict[str, NDArray[Any]]]
    ess: NDArray[Any]
    num_draws: int
    least_share: float = 1.0

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons not to trust the errors, a sentence each; empty if there is none."""
        found, ess = [], float(np.median(self.ess))
        if ess < max(MIN_ESS, MIN_ESS_SHARE * self.num_draws):
            found.append(
                f"reweighting leaves {ess:.0f} effective draws of {self.num_draws}: log Z is too "
                "uncertain for its error to be told, and it is understated; use more draws of the "
                "anchors, or anchors nearer to the posterior"
            )
        if self.least_share < MIN_SHARE:
            found.append(
                f"the posterior reaches where {self.least_share:.1%} of what log Z is made of "
                f"would count, and log Z is NaN below {MIN_SHARE:.0%}: the posterior is cut off "
                "there, which is in no error; use anchors or a base nearer to it"
            )
        return tuple(found)

    def attached_to(self, source: Any) -> Record:
        """Returns the draws with the errors of their means, which :func:`summary` then shows.

        Args:
            source: What the errors were computed from.
        """
        record = as_record(source)
        means = {k: v for site, by in self.mcse.items() for k, v in _scalars(site, by["mean"])}
        attrs = {**record.attrs, "mcse_logz": means}
        if self.doubts:
            attrs["mcse_logz_doubts"] = "; ".join(self.doubts)
        return replace(record, attrs=attrs)


def mcse_logz(
    source: Any,
    log_z: Resampled,
    natural: Naturals,
    num_observations: int | Tensor,
    *,
    num_replicates: int = 100,
    quantiles: Sequence[float] = (0.05, 0.95),
    max_draws: int = 2000,
) -> AnchorError:
    """Returns the error that log Z adds to each summary of a posterior.

    Args:
        source: Draws of the posterior, as :func:`~pyro_ebm.chains.to_arviz` takes them.
        log_z: The function that the posterior was drawn with, an
            :class:`~pyro_ebm.normalizers.Anchored`, or a ``BaseImportance`` by its parameters
            (``log_z.by(...)``).
        natural: From draws by site, ``(S,) + event_shape``, to the natural parameters that
            ``log_z`` was called with, ``(S, p)``, or ``(S, ..., p)`` for several sites or groups.
        num_observations: n, how often Z enters the likelihood; one number, or one for each group.
        num_replicates: Resampled functions; the errors are then known to ``1 / sqrt(2 B)``.
        quantiles: Which quantiles, besides mean and standard deviation.
        max_draws: Draws to reweight, evenly spaced among all.

    Raises:
        ValueError: If ``natural`` does not return one row for each draw, or ``log_z`` is not told
            at one of them.

    Example:
        >>> from pyro_ebm.energies import Ising
        >>> from pyro_ebm.normalizers import anchored
        >>> _ = torch.manual_seed(0)
        >>> log_z = anchored(Ising(0.0, (4, 4)), torch.tensor([[0.2]]), num_draws=1000)
        >>> draws = {"k": 0.2 + 0.02 * torch.randn(4, 250)}
        >>> error = mcse_logz(draws, log_z, lambda draws: draws["k"][:, None], 50)
        >>> sorted(error.mcse["k"])
        ['mean', 'q05', 'q95', 'sd']
    """
    record = as_record(source)
    draws = _thinned(record, whole("max_draws", max_draws, least=2))
    eta = _naturals(draws, log_z, natural)
    weights = _weights(eta, log_z, num_observations, num_replicates)
    levels = [probability("quantiles", q) for q in quantiles]
    mcse = {n: _spreads(x, weights, levels) for n, x in draws.items() if x.is_floating_point()}
    ess = 1.0 / weights.square().sum(1)
    return AnchorError(mcse, to_numpy(ess), weights.shape[1], _least_share(eta, log_z))


def _thinned(record: Record, max_draws: int) -> dict[str, Tensor]:
    total = record.num_chains * record.num_samples
    kept = torch.linspace(0, total - 1, min(total, max_draws)).long()
    flat = {n: torch.as_tensor(x).flatten(0, 1) for n, x in record.draws.items()}
    return {name: x[kept] for name, x in flat.items()}


def _naturals(draws: dict[str, Tensor], log_z: Resampled, natural: Naturals) -> Tensor:
    """Natural parameters of every draw, ``(S, ..., p)``, where log Z is told."""
    num_draws = len(next(iter(draws.values())))
    eta = natural(draws).detach().double()
    if eta.dim() < 2 or eta.shape[0] != num_draws or eta.shape[-1] != log_z.num_parameters:
        raise ValueError(
            f"natural must return ({num_draws}, ..., {log_z.num_parameters}) for {num_draws} "
            f"draws, got {tuple(eta.shape)}"
        )
    if bool(log_z(eta).isnan().any()):
        raise ValueError(
            "log Z is not told at some of the draws: are they of a posterior with this log_z?"
        )
    return eta


def _least_share(eta: Tensor, log_z: Resampled) -> float:
    """The 1 % quantile of shares that count, by their 5 % quantile: no draw is beyond the edge."""
    log_shares = log_z.share(eta).log().reshape(len(eta), -1).amin(1)
    middle, low = log_shares.quantile(log_shares.new_tensor([0.5, 0.05]))
    return float((middle - _FURTHER * (middle - low)).exp())


def _weights(
    eta: Tensor, log_z: Resampled, num_observations: int | Tensor, num_replicates: int
) -> Tensor:
    """Weights of every draw under every replicate, ``(B, S)``."""
    changes = log_z.changes(eta, whole("num_replicates", num_replicates, least=10))
    shifts = -(changes * num_observations).reshape(len(changes), len(eta), -1).sum(2)
    return shifts.nan_to_num(-torch.inf).softmax(1)  # NaN: a replicate does not tell


def _spreads(x: Tensor, weights: Tensor, levels: list[float]) -> dict[str, NDArray[Any]]:
    """The spread over replicates of each summary of ``(S,) + event_shape``."""
    flat = x.double().reshape(len(x), -1)
    mean = weights @ flat
    moments = {"mean": mean, "sd": (weights @ flat.square() - mean.square()).clamp_min(0).sqrt()}
    ordered, order = flat.sort(0)
    for level in levels:
        columns = [
            _quantile(c, weights[:, o], level) for c, o in zip(ordered.T, order.T, strict=True)
        ]
        moments[_label(level)] = torch.stack(columns, 1)
    return {k: to_numpy(v.std(0).reshape(x.shape[1:])) for k, v in moments.items()}


def _label(level: float) -> str:
    """``"q05"``, ``"q95"``, ``"q02.5"``."""
    whole_part, rest = divmod(round(1e6 * level), 10_000)
    return f"q{whole_part:02d}" + (f"{rest / 10_000:g}"[1:] if rest else "")


def _quantile(ordered: Tensor, weights: Tensor, level: float) -> Tensor:
    """Weighted quantiles of ordered values ``(S,)``, between the middles of their weights."""
    middles = weights.cumsum(1) - 0.5 * weights
    above = torch.searchsorted(middles, torch.full_like(middles[:, :1], level))
    above = above.clamp(1, len(ordered) - 1)[:, 0]
    rows = torch.arange(len(weights))
    low, high = middles[rows, above - 1], middles[rows, above]
    share = ((level - low) / (high - low).clamp_min(1e-300)).clamp(0.0, 1.0)
    return ordered[above - 1] + share * (ordered[above] - ordered[above - 1])


def _scalars(site: str, values: NDArray[Any]) -> list[tuple[str, float]]:
    """Names as in the rows of a summary table, with their values."""
    if values.ndim == 0:
        return [(site, float(values))]
    places = np.ndindex(*values.shape)
    return [(f"{site}[{', '.join(map(str, at))}]", float(values[at])) for at in places]
