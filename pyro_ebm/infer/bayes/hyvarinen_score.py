r"""The Hyvärinen score of a posterior's predictive: comparing models whose log Z is out of reach.

For a density p of a row y of real numbers

.. math:: H(y, p) = 2\,\Delta \log p(y) + |\nabla \log p(y)|^2 ,

lower is better, is a proper score: its expectation exceeds that of the truth by the Fisher
divergence. Constant factors of p do not enter. For the predictive of row i given all others,
:math:`p(y_i \mid y_{-i}) = \int p_\theta(y_i)\, \pi(\theta \mid y_{-i})\, d\theta`, derivatives in
:math:`y_i` may be taken under the integral, and weighting by :math:`p_\theta(y_i)` turns
:math:`\pi(\theta \mid y_{-i})` into the posterior given *all* rows:

.. math:: H_i = E\{2\,\Delta \log p_\theta(y_i) + 2\,|\nabla \log p_\theta(y_i)|^2\}
          - |E\,\nabla \log p_\theta(y_i)|^2, \qquad E \text{ over } \pi(\theta \mid y_{1 \dots n}).

So draws of the one posterior give the *leave-one-out* score of every row, with neither refits nor
importance weights, and without log Z. It is neither the in-sample score of a density nor the
prequential one (the sum over rows given the former ones only), which needs a posterior for every n.
For rows held out of the posterior the formula does not hold: they would have to be weighted by
:math:`p_\theta(y)`, log Z included.

A site that is one dependent observation has one row, and its score is that of the prior predictive
of all its elements: what a Bayes factor compares, without its dependence on how vague the prior is.

The score sees local shape, and hardly the weights of separated modes. It is invariant to neither
the scale of y nor other transformations: compare models of the same y.

References:
    Hyvärinen, Estimation of non-normalized statistical models by score matching, JMLR 6, 2005;
    Dawid, Musio, Bayesian model selection based on proper scoring rules, Bayesian Analysis 10,
    2015; Shao, Jacob, Ding, Tarokh, Bayesian model comparison with the Hyvärinen score, JASA 114,
    2019, arXiv:1711.00136.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_ebm.chains.observations import Conditioned, Site, check_leaves_rows_out
from pyro_ebm.chains.per_draw import at_all_draws
from pyro_ebm.chains.record import as_record
from pyro_ebm.distributions import GeneralizedEBM, unwrap
from pyro_ebm.distributions.layers import mask_of, num_reinterpreted
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.infer.score.smoothness import has_jumps
from pyro_ebm.infer.scoring.unconstrained import Unconstrained
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.constraints import plain

_CHUNK = 2**21  # numbers in x times draws at once
_NUM_CHECKED = 5


@dataclass(frozen=True, eq=False)
class HyvarinenScore:
    """The Hyvärinen score of a site's rows, each given all others; lower is better.

    Args:
        pointwise: The score of every row that was observed, ``(N,)``, in inverse squared units of
            the data.
        mcse: Monte Carlo standard error of the sum.
        num_draws: Posterior draws behind it.

    Example:
        >>> print(HyvarinenScore(torch.tensor([-1.0, 0.5, -0.7]), 0.02, 1000))
        Hyvärinen score -1.2 ± 1.4 over 3 rows, Monte Carlo error 0.02 of 1000 draws
    """

    pointwise: Tensor
    mcse: float
    num_draws: int

    @property
    def value(self) -> float:
        """The sum over rows."""
        return float(self.pointwise.sum())

    @property
    def stderr(self) -> float:
        """How the sum varies with the rows, taken as independent; ``nan`` for one row."""
        rows = len(self.pointwise)
        return float(self.pointwise.std()) * rows**0.5 if rows > 1 else math.nan

    def minus(self, other: HyvarinenScore) -> HyvarinenScore:
        """Returns the difference, row by row: negative where this model is the better one.

        Its :attr:`stderr` is that of a paired comparison; the Monte Carlo errors add up.

        Raises:
            ValueError: If the numbers of rows differ.
        """
        if self.pointwise.shape != other.pointwise.shape:
            raise ValueError(
                f"scores of {len(self.pointwise)} and {len(other.pointwise)} rows cannot be "
                "compared: both models must score the same data"
            )
        return HyvarinenScore(
            self.pointwise - other.pointwise,
            math.hypot(self.mcse, other.mcse),
            min(self.num_draws, other.num_draws),
        )

    def __str__(self) -> str:
        rows = len(self.pointwise)
        spread = f" ± {self.stderr:.2g} over {rows} rows" if rows > 1 else " of one observation"
        error = f"Monte Carlo error {self.mcse:.2g} of {self.num_draws} draws"
        return f"Hyvärinen score {self.value:.4g}{spread}, {error}"


def hyvarinen_score(
    source: Any,
    *,
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    site: str | None = None,
    num_draws: int = 1000,
) -> HyvarinenScore:
    """Scores every row of a data site by the predictive that all other rows make.

    Args:
        source: Draws of the posterior given *all* the data: a finished MCMC, a ``Record``, a
            ``Posterior``, or a dict of ``(chains, draws, ...)`` arrays. Draws of a generalized
            posterior give this score as far as they stand for those by Bayes' rule.
        model: The Pyro model; its EBM sites need no log Z.
        args: Its positional arguments, with those data.
        kwargs: Its keyword arguments.
        site: The data site; needed if there are several.
        num_draws: At most so many draws are used, evenly spaced in every chain; a row costs as
            many backward passes as it has coordinates.

    Returns:
        A :class:`HyvarinenScore`; rows that a mask hides are left out.

    Raises:
        ValueError: If the site's rows are not vectors of real numbers, a latent has no draws, a
            plate is subsampled, the site is scaled, or the slope of the energy does not depend on
            x, as between the kinks of a piecewise linear one, which the score cannot see.
        TypeError: If the site is a generalized EBM, which has no density.
        NonFiniteEnergyError: If a derivative of the energy is not finite at a row.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm import EnergyDistribution
        >>> def model(x):
        ...     precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         law = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", law, obs=x)
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(20)
        >>> draws = dist.Gamma(12.0, 1 + x.square().sum() / 2).sample((4, 250))
        >>> hyvarinen_score({"precision": draws}, model=model, args=(x,)).pointwise.shape
        torch.Size([20])
    """
    draws = _thinned(as_record(source).draws, whole("num_draws", num_draws, least=4))
    shape = next(iter(draws.values())).shape[:2]
    conditioned = Conditioned(model, args, kwargs or {}, draws)
    with torch.no_grad(), pyro.validation_enabled(is_validate=False):
        like = conditioned.trace(conditioned.values(0))
        name = _checked(conditioned, like, site)
        slopes, traces = _derivatives(conditioned, like, name)
        keep = _observed(like.nodes[name])
    slopes, traces = slopes[:, keep], traces[:, keep]
    if not bool(slopes.isfinite().all() and traces.isfinite().all()):
        raise NonFiniteEnergyError(f"site {name!r}: derivatives of the energy are not finite at y")
    if not bool(traces.any()) or _has_kinks(like.nodes[name]):
        raise ValueError(
            f"site {name!r}: the slope of the log density moves by jumps or not at all, as that of "
            "a network of ReLUs or of absolute values does, and the Hyvärinen score cannot see "
            "kinks: use smooth energies"
        )
    return _score(slopes, traces, shape)


def _thinned(draws: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Draws evenly spaced in every chain; more chains than draws wanted give one of each."""
    chains, size = next(iter(draws.values())).shape[:2]
    every = max(1, -(-chains * size // most))
    return {name: value[:, ::every] for name, value in draws.items()}


def _score(slopes: Tensor, traces: Tensor, shape: tuple[int, ...]) -> HyvarinenScore:
    """Reads slopes ``(S, N, d)`` and traces ``(S, N)``."""
    mean = slopes.mean(0)
    terms = 2 * traces + 2 * slopes.square().sum(-1)
    pointwise = terms.mean(0) - mean.square().sum(-1)
    influence = (terms - 2 * (mean * slopes).sum(-1)).sum(-1).reshape(shape)
    size = float(influence.numel())
    if influence.shape[1] >= 4 and float(influence.var()) > 0:
        found = float(effective_sample_size(influence, chain_dim=0, sample_dim=1))
        size = min(size, found) if found == found else size
    return HyvarinenScore(pointwise, float(influence.std()) / size**0.5, influence.numel())


# --- what is refused


def _checked(conditioned: Conditioned, like: Any, wanted: str | None) -> str:
    sites = conditioned.data_sites(like)
    if not sites:
        raise ValueError(
            "hyvarinen_score: the model observes no data site to score: give its data as obs= of a "
            "sample site"
        )
    name = next(iter(sites)) if wanted is None and len(sites) == 1 else wanted
    if name not in sites:
        raise ValueError(f"site must be one of the data sites {sorted(sites)}, got {wanted!r}")
    check_leaves_rows_out(like, [name])
    _check_real(name, sites[name])
    return name


def _check_real(name: str, site: Site) -> None:
    fn = site["fn"]
    if isinstance(unwrap(fn), GeneralizedEBM):
        raise TypeError(f"GeneralizedEBM site {name!r} has no density, hence no Hyvärinen score")
    if plain(fn.support) is not constraints.real:
        raise ValueError(
            f"the Hyvärinen score is for densities on all real numbers, and site {name!r} lives on "
            f"{fn.support}: model transformed data (such as the log of positive ones), or compare "
            "by az.loo with log Z known"
        )


def _has_kinks(site: Site) -> bool:
    law = unwrap(site["fn"])
    if law is None:
        return False
    space = Unconstrained(law, "hyvarinen_score")
    return has_jumps(space, space.coordinates(law.broadcast_value(site["value"])))


def _observed(site: Site) -> Tensor:
    """Which rows count, flat."""
    mask = mask_of(site["fn"], site["mask"])
    rows = site["fn"].batch_shape
    if isinstance(mask, Tensor) and num_reinterpreted(site["fn"]):
        raise ValueError("parts of rows are masked, and a row is scored as a whole or not at all")
    return torch.as_tensor(mask).expand(rows).reshape(-1)


# --- derivatives in x, for many draws at once


def _derivatives(conditioned: Conditioned, like: Any, name: str) -> tuple[Tensor, ...]:
    """Gradients ``(S, N, d)`` and Laplacians ``(S, N)`` of the log density, in double precision."""
    node = like.nodes[name]
    num_rows, chunk = node["fn"].batch_shape.numel(), _CHUNK // max(1, node["value"].numel())

    def read(trace: Any, num_draws: int) -> tuple[Tensor, ...]:
        return _of_site(trace.nodes[name], num_rows, num_draws)

    return at_all_draws(conditioned, like, read, chunk=max(1, chunk), num_checked=_NUM_CHECKED)


def _of_site(site: Site, num_rows: int, num_draws: int) -> tuple[Tensor, Tensor]:
    fn = site["fn"]
    x = site["value"].detach().expand(fn.batch_shape + fn.event_shape).clone().requires_grad_()
    with torch.enable_grad():
        slope = torch.autograd.grad(_log_density(fn, x).sum(), x, create_graph=True)[0]
        flat = slope.reshape(*fn.batch_shape, fn.event_shape.numel())
        trace = torch.zeros_like(flat[..., 0])
        for j, part in enumerate(flat.unbind(-1) if slope.requires_grad else ()):
            second = torch.autograd.grad(part.sum(), x, retain_graph=True, materialize_grads=True)
            trace = trace + second[0].reshape(flat.shape)[..., j]
    shape = (num_draws, num_rows)
    slopes, traces = flat.detach().double(), trace.detach().double()
    return slopes.reshape(*shape, -1), traces.reshape(shape)


def _log_density(fn: Any, x: Tensor) -> Tensor:
    """The log density up to log Z, which no derivative in x sees."""
    p = unwrap(fn)
    return fn.log_prob(x) if p is None else p.unnormalized_log_prob(x)
