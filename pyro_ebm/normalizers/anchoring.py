r"""Anchors placed where the posterior is: draw, fit, move, until log Z holds there.

An anchored log Z is good near its anchors, and where the posterior is, only the posterior knows.
So it is looked for with a rough log Z first, the quadratic

.. math:: \log Z(\eta) \approx m \cdot (\eta - c) + \tfrac12 (\eta - c)^\top V (\eta - c), \qquad
    m, V = \text{mean, covariance of } T \text{ at } c,

which is convex and holds everywhere after a fashion, so that no chain meets a wall. Its posterior
is a Newton step; the centre c follows it, at most :data:`REACH` standard deviations of a statistic
at a time. Once it stays, anchors are put at draws of the posterior near the mean and near two
standard deviations to both sides of it along every principal direction, and more between them where
those are too far apart to overlap. Draws are then added until :math:`\sqrt{p n / S}` is within the
rule at all these places under the posterior that the anchors themselves give.

References:
    Geyer, Thompson, Constrained Monte Carlo maximum likelihood for dependent data, JRSS B 54, 1992;
    Hummel, Hunter, Handcock, Improving simulation-based algorithms for fitting ERGMs, Journal of
    Computational and Graphical Statistics 21, 2012 (the quadratic, and steps of limited length).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.normalizers.anchor_error import Naturals
from pyro_ebm.normalizers.anchored import Anchored, NoOverlapError, anchored
from pyro_ebm.normalizers.displacement import MAX_DISPLACEMENT, draws_wanted, times_as_many
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.held_draws import accounted

REACH = 1.5
"""Standard deviations of a statistic between neighbouring anchors, and per step of the search."""

_NUM_ROUGH = 2000
_MAX_SEARCH = 40
_MAX_ROUNDS = 6
_NUM_CHAINS, _NUM_SAMPLES, _WARMUP = 32, 60, 80
_STAYS = 0.5  # posterior standard deviations that a centre may still be off
_MARGIN = 1.5  # draws beyond what the rule asks for


def anchored_to(
    model: Callable[..., Any],
    *args: Any,
    family: ExponentialFamily,
    natural: Naturals,
    first: Tensor,
    num_observations: int,
    start: Tensor | None = None,
    max_draws: int = 200_000,
) -> Anchored:
    """Returns a log Z that holds where a model's posterior is.

    Args:
        model: A Pyro model whose first argument is a log Z: a function of natural parameters
            ``(..., p)``, to be used as ``log_normalizer=lambda: log_z(energy.natural())``.
        *args: Its other arguments.
        family: The family of the EBM site, with an exact sampler or sweeps.
        natural: From draws by site, ``(S,) + event_shape``, to natural parameters ``(S, ..., p)``.
        first: Natural parameters to begin at, ``(p,)``.
        num_observations: n, how often Z enters the likelihood, of a group where there are groups.
        start: Where chains of the family start, ``event_shape``; needed if draws are not exact.
        max_draws: Draws of the family at most, over all anchors.

    Raises:
        RuntimeError: If the centre does not come to rest, the rule is not met by that many
            draws, or the posterior reaches a degenerate phase, whose draws are like no others.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.energies import Ising
        >>> def model(log_z, x):
        ...     energy = Ising(pyro.sample("k", dist.Normal(0.0, 1.0)), (4, 4))
        ...     law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
        ...     pyro.sample("x", law, obs=x)
        >>> _ = torch.manual_seed(0)
        >>> log_z = anchored_to(
        ...     model, torch.ones(4, 4), family=Ising(0.0, (4, 4)),
        ...     natural=lambda draws: draws["k"][:, None], first=torch.zeros(1), num_observations=1,
        ... )  # doctest: +SKIP
    """
    whole("num_observations", num_observations, least=1)
    if first.dim() != 1:
        raise ValueError(
            f"first must be one set of natural parameters (p,), got {tuple(first.shape)}"
        )
    loop = _Loop(model, args, family, natural, start)
    cloud = loop.search(first.double())
    wanted = _MARGIN * draws_wanted(first.shape[-1], num_observations)
    for _ in range(_MAX_ROUNDS):
        anchors = _spread(cloud)
        per_anchor = math.ceil(max(wanted / len(anchors), _NUM_ROUGH / 2))
        if per_anchor * len(anchors) > max_draws:
            break
        log_z = loop.anchored(anchors, per_anchor)
        cloud = loop.posterior(log_z, cloud.covariance, held=log_z(cloud.rows).isfinite())
        places = _places(cloud)
        worst = float(log_z.displacement(places, num_observations).max())
        if worst <= MAX_DISPLACEMENT and bool(log_z(places).isfinite().all()):
            return log_z
        wanted = _MARGIN * per_anchor * len(anchors) * max(1.0, times_as_many(worst))
    raise RuntimeError(
        f"the rule sqrt(p n / S) <= {MAX_DISPLACEMENT} asks for {wanted:.0f} draws of "
        f"{type(family).__name__} where the posterior is, and max_draws is {max_draws}: allow for "
        "more, or use mcmc.Exchange"
    )


@dataclass(frozen=True)
class _Cloud:
    """Draws of a posterior: natural parameters of draws and groups, ``(M, p)``.

    Beside them the covariance of the statistics near there, ``(p, p)``, as a measure of distance.
    """

    rows: Tensor
    covariance: Tensor

    @property
    def mean(self) -> Tensor:
        return self.rows.mean(0)

    def axes(self) -> Tensor:
        """Principal directions times two standard deviations, ``(p, p)``, a row each."""
        covariance = torch.cov(self.rows.T).reshape(self.rows.shape[1], -1)
        values, vectors = torch.linalg.eigh(covariance)
        return 2.0 * values.clamp_min(0.0).sqrt()[:, None] * vectors.T

    def nearest(self, point: Tensor) -> Tensor:
        """The draw next to a point, which is a parameter for certain."""
        inverse = torch.linalg.pinv(torch.cov(self.rows.T).reshape(len(point), -1))
        away = self.rows - point
        return self.rows[((away @ inverse) * away).sum(1).argmin()]

    def length(self, step: Tensor) -> float:
        """The length of a step in standard deviations of the statistics."""
        return float((step @ self.covariance @ step).clamp_min(0.0).sqrt())


def _places(cloud: _Cloud) -> Tensor:
    """Draws near the mean and two standard deviations away from it, ``(2 p + 1, p)``."""
    ends = [cloud.mean + sign * axis for axis in cloud.axes() for sign in (-1.0, 1.0)]
    return torch.stack([cloud.nearest(p) for p in (cloud.mean, *ends)])


def _spread(cloud: _Cloud) -> Tensor:
    """Anchors at these places, with more between them where they would not overlap."""
    points = [cloud.nearest(cloud.mean)]
    for end in _places(cloud)[1:]:
        step = end - points[0]
        num = max(1, math.ceil(cloud.length(step) / REACH))
        points += [cloud.nearest(points[0] + k / num * step) for k in range(1, num + 1)]
    return torch.stack(points).unique(dim=0)


class _Rough:
    """The quadratic through mean and covariance of the statistics at one anchor."""

    def __init__(self, at_centre: Anchored) -> None:
        rows = at_centre.statistics.flatten(0, 2)
        self.centre, self.mean = at_centre.anchors[0], rows.mean(0)
        self.covariance = torch.cov(rows.T).reshape(rows.shape[1], -1)

    def __call__(self, natural: Tensor) -> Tensor:
        away = natural.double() - self.centre
        value = away @ self.mean + 0.5 * ((away @ self.covariance) * away).sum(-1)
        return value.to(natural.dtype)


@dataclass
class _Loop:
    """Short posteriors with one log Z after the other, each begun where the last one ended."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    family: ExponentialFamily
    natural: Naturals
    start: Tensor | None
    _ends: dict[str, Tensor] | None = None

    def search(self, first: Tensor) -> _Cloud:
        """The posterior under the quadratic at a centre that it leaves in place."""
        centre = first
        for _ in range(_MAX_SEARCH):
            at_centre = self.anchored(centre[None], _NUM_ROUGH)
            rough = _Rough(at_centre)
            cloud = self.posterior(rough, rough.covariance)
            step = cloud.mean - centre
            length = cloud.length(step)
            if length <= REACH and bool((step.abs() <= _STAYS * cloud.rows.std(0)).all()):
                return cloud
            centre = centre + min(1.0, REACH / max(length, 1e-9)) * step
        raise RuntimeError(
            f"the posterior of {type(self.family).__name__}'s parameters was not found from "
            f"first={first.tolist()} in {_MAX_SEARCH} steps: begin nearer to it"
        )

    def anchored(self, anchors: Tensor, num_draws: int) -> Anchored:
        """Log Z from this many draws at each of the anchors."""
        try:
            return anchored(self.family, anchors, num_draws=num_draws, start=self.start)
        except NoOverlapError as error:
            raise RuntimeError(
                f"draws of {type(self.family).__name__} at neighbouring places of the posterior "
                "have nothing in common: it reaches a degenerate phase, where they turn all at "
                "once; use a tighter prior, or mcmc.Exchange"
            ) from error

    def posterior(
        self, log_z: Callable[[Tensor], Tensor], covariance: Tensor, *, held: Tensor | None = None
    ) -> _Cloud:
        """A short posterior; its chains start at former draws, of those where ``held``."""
        mcmc = MCMC(
            HMC(self.model), _NUM_SAMPLES, _WARMUP, num_chains=_NUM_CHAINS, disable_progbar=True
        )
        with accounted(), warnings.catch_warnings():
            # the check is at a draw of the prior, where log Z need not be
            warnings.filterwarnings("ignore", message="whether every log Z covers")
            mcmc.run(log_z, *self.args, initial_params=self._starts(held))
        self._ends = {
            name: x.flatten(0, 1) for name, x in mcmc.get_samples(unconstrained=True).items()
        }
        natural = self.natural(mcmc.get_samples(group_by_chain=False)).detach().double()
        return _Cloud(natural.flatten(0, -2), covariance)

    def _starts(self, held: Tensor | None) -> dict[str, Tensor] | None:
        if self._ends is None:
            return None
        num = len(next(iter(self._ends.values())))
        fit = torch.ones(num) if held is None else held.reshape(num, -1).all(1).double()
        if not bool(fit.any()):
            raise RuntimeError(
                "log Z is not told at any draw of the posterior that its anchors were placed by"
            )
        chosen = torch.multinomial(fit, _NUM_CHAINS, replacement=True)
        return {name: x[chosen] for name, x in self._ends.items()}
