r"""Are the draws of an inexact exchange chain those of the posterior?

R-hat cannot tell: double Metropolis–Hastings converges, to the wrong law. Two diagnostics can, by
auxiliary draws :math:`y_1, \dots, y_M \sim p_\theta` at the draws :math:`\theta` of the chain. In
the unconstrained coordinates q, with the potential U that leaves log Z out, the natural parameters
:math:`\eta(q)` and the statistics T, the score and the second derivative of the log posterior are

.. math::
    s = -\nabla U - \nabla \eta \cdot \mathbb E\, T, \qquad
    H = -\nabla^2 U - \nabla^2 \eta \cdot \mathbb E\, T
        - \nabla \eta \operatorname{Cov}(T)\, \nabla \eta^\top .

*Curvature (ACD).* Over the posterior :math:`\mathbb E[s s^\top + H] = 0`, Bartlett's second
identity; draws that are too wide have a positive mean. The mean of the matrix's different entries
is compared with its own error.

*Kernel Stein discrepancy (AIKS).* The mean over pairs of draws of the
:mod:`~pyro_ebm.ops.stein_kernel` of s is zero too, and compared with what random signs make of it.

Unlike in the paper, where M is 200 000, both are unbiased at any M: the covariance of the M draws
over M is taken off :math:`\hat s \hat s^\top`, and no draw is paired with itself. The blocks that
errors are counted by are whole chains, so that nothing is assumed of the correlation within one;
of few chains, stretches of them. Both have their bound from random signs of the blocks; for ACD and
many blocks it is the paper's, the .99 quantile of :math:`\chi^2_r` for r entries.

**What they do not see.** Modes that no chain has visited; errors smaller than
:attr:`ExchangeDiagnostics.detectable`; and where auxiliary draws are sweeps from the data, what
those sweeps have not forgotten.

References:
    Kang, Hughes, Haran, Measuring sample quality in algorithms for intractable normalizing function
    problems, 2021, arXiv:2109.05121; Leucht, Neumann, Dependent wild bootstrap for degenerate U-
    and V-statistics, Journal of Multivariate Analysis 117, 2013.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_ebm.chains import Record
from pyro_ebm.mcmc.exchange.auxiliary import Auxiliary, ExactDraws
from pyro_ebm.mcmc.exchange.exchange_kernel import UNJUDGED, best_for, check_drawable
from pyro_ebm.mcmc.exchange.exchange_target import ExchangeTarget
from pyro_ebm.mcmc.runs.driver import MCMC
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.detection import detectable
from pyro_ebm.ops.rank_rhat import worst_rhat
from pyro_ebm.ops.stein_kernel import imq_stein_kernel

__all__ = ["ExchangeDiagnostics", "exchange_diagnostics"]

LEVEL = 0.01
"""How often each of the two speaks up against exact draws."""

MAX_RHAT = 1.1  # beyond which chains are too short to be judged by anything else
MAX_DETECTABLE = 0.5  # beyond which nearly any draws would pass
MIN_BLOCKS = 40
NUM_SIGNS = 4000
LONG_SWEEPS = 200
_BLOCKS_PER_ENTRY = 4


@dataclass(frozen=True)
class ExchangeDiagnostics:
    """What :func:`exchange_diagnostics` found; ``print`` it to read it.

    Args:
        acd: The curvature diagnostic, at least 0; NaN where the model has no finite score.
        acd_threshold: What exact draws stay under 99 times in 100.
        aiks: The squared kernel Stein discrepancy, unbiased and so sometimes negative.
        aiks_pvalue: How often exact draws would give a larger one.
        detectable: The smallest relative error of a posterior standard deviation that these draws
            would show nine times in ten, about.
        num_draws: Posterior draws that were looked at.
        auxiliary: How the auxiliary draws were made.
        r_hat: The largest R-hat of the run; above :data:`MAX_RHAT` its chains are to be blamed
            before its sampler. NaN where chains are too short to have one.
    """

    acd: float
    acd_threshold: float
    aiks: float
    aiks_pvalue: float
    detectable: float
    num_draws: int
    auxiliary: str
    r_hat: float = 1.0

    @property
    def trusted(self) -> bool:
        """Whether enough draws, of chains that have met, have nothing against them."""
        return self._have_met and self._are_silent and self.detectable <= MAX_DETECTABLE

    @property
    def sentence(self) -> str:
        """The verdict."""
        if not self._are_finite:
            return (
                "these draws cannot be judged: their scores are not finite, for a derivative of "
                "the model, or a statistic of auxiliary draws, is NaN or infinite. Look at both at "
                "a draw, and mask missing rows"
            )
        if self.r_hat > MAX_RHAT:
            return (
                f"do not trust these draws: the chains have not met, R-hat is {self.r_hat:.3g}, "
                "whatever their sampler. Use more warmup_steps and num_samples, and judge it then"
            )
        if not self._are_silent:
            return (
                "do not trust these draws: they are not those of the posterior. Use an exact "
                "sampler of the energy, or more sweeps, until this is silent"
            )
        if not self._have_met:
            return (
                "too few draws to judge: chains of under 4 do not tell whether they have met. Use "
                "more num_samples"
            )
        if not self.trusted:
            return (
                "too few draws to judge: a posterior standard deviation off by less than "
                f"{self.detectable:.0%} would probably have been missed. Use more num_samples, and "
                "judge them with more max_draws or num_auxiliary"
            )
        return (
            "nothing speaks against these draws, and a posterior standard deviation off by "
            f"{self.detectable:.0%} would probably have been seen"
        )

    @property
    def _are_finite(self) -> bool:
        return math.isfinite(self.acd) and math.isfinite(self.aiks)

    @property
    def _have_met(self) -> bool:
        return self.r_hat <= MAX_RHAT

    @property
    def _are_silent(self) -> bool:
        return self.acd <= self.acd_threshold and self.aiks_pvalue >= LEVEL

    def attached_to(self, record: Record) -> Record:
        """Returns a record whose attributes hold all of this, for ``to_arviz`` and ``diagnose``.

        Args:
            record: That of the run which was judged, ``mcmc.record``.
        """
        found = {f"exchange_{name}": value for name, value in asdict(self).items()}
        if "bias" in record.attrs:
            bias = record.attrs["bias"].removesuffix(UNJUDGED)
            found["bias"] = f"{bias}; {self.sentence}"
        return replace(record, attrs={**record.attrs, **found, "exchange_verdict": self.sentence})

    def __str__(self) -> str:
        return (
            f"ACD {self.acd:.3g} (at most {self.acd_threshold:.3g}), AIKS {self.aiks:.2g} "
            f"(p = {self.aiks_pvalue:.2g}), {self.num_draws} draws, {self.auxiliary}\n"
            f"  {self.sentence}"
        )


class Bartlett(NamedTuple):
    """Unbiased estimates at n positions, of what is zero on average over the posterior.

    Args:
        score: s, ``(n, D)``.
        second: s s' + H, ``(n, D, D)``.
    """

    score: Tensor
    second: Tensor


def exchange_diagnostics(
    mcmc: MCMC,
    *,
    auxiliary: Auxiliary | None = None,
    num_auxiliary: int = 20,
    max_draws: int = 1000,
) -> ExchangeDiagnostics:
    """Judges the draws of an exchange kernel by auxiliary draws that are better than its own.

    Args:
        mcmc: A finished run.
        auxiliary: How auxiliary draws are made: by the exact sampler if all energies have one, else
            by 200 sweeps from the data.
        num_auxiliary: M, at least 2; ten times as many change little.
        max_draws: Posterior draws to look at, evenly spaced; the cost is this times M data sets.

    Raises:
        TypeError: If the run is not one of :class:`~pyro_ebm.mcmc.Exchange`, or nothing draws from
            a site's law: give ``auxiliary``.
        ValueError: If there are too few draws, they stand still, or every chain has its own data.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.energies import Ising
        >>> from pyro_ebm.mcmc import Exchange, Sweeps
        >>> def model(image):
        ...     coupling = pyro.sample("coupling", dist.Uniform(0.0, 0.4))
        ...     law = EnergyDistribution(Ising(coupling, (13, 13), periodic=False))
        ...     pyro.sample("image", law, obs=image)
        >>> kernel = Exchange(model, auxiliary=Sweeps(2))
        >>> mcmc = MCMC(kernel, 10, 10, num_chains=40, disable_progbar=True)
        >>> mcmc.run(2.0 * torch.eye(13) - 1.0)
        >>> found = exchange_diagnostics(mcmc, auxiliary=Sweeps(8), num_auxiliary=4, max_draws=80)
        >>> found.num_draws, found.auxiliary
        (80, '4 auxiliary draws each by 8 sweeps from the data')
    """
    target, blocks = _draws(mcmc, whole("max_draws", max_draws, least=MIN_BLOCKS))
    auxiliary = (auxiliary or best_for(target, LONG_SWEEPS)).bound(target.energies)
    by_sweeps = auxiliary.moves_by_sweeps
    check_drawable(target, exactly=isinstance(auxiliary, ExactDraws), by_sweeps=by_sweeps)
    q = blocks.flatten(0, 1)
    found = bartlett(target, q, auxiliary, whole("num_auxiliary", num_auxiliary, least=2))
    x, score, second = _whitened(q, found)
    means = second.unflatten(0, blocks.shape[:2]).mean(1)
    signs = _signs(len(means), means)
    acd, threshold = _hotelling(_entries(means), signs)
    aiks, pvalue = _stein(imq_stein_kernel(x, score), blocks.shape[1], signs)
    return ExchangeDiagnostics(
        acd,
        threshold,
        aiks,
        pvalue,
        detectable=detectable(threshold**0.5) * _resolution(means, score),
        num_draws=len(q),
        auxiliary=_words(auxiliary, num_auxiliary),
        r_hat=_largest_rhat(mcmc.positions()[1]),
    )


# --- draws


def _draws(mcmc: MCMC, max_draws: int) -> tuple[ExchangeTarget, Tensor]:
    """Evenly spaced unconstrained draws of the run, in blocks, ``(B, N, D)``."""
    target, draws = mcmc.positions()
    if not isinstance(target, ExchangeTarget):
        raise TypeError(
            "exchange_diagnostics judges a run of Exchange, got one of "
            f"{type(mcmc.kernel).__name__}: for others see pyro_ebm.diagnose"
        )
    if getattr(mcmc.kernel, "couples_chains", False):
        raise TypeError(
            "exchange_diagnostics takes chains for independent, and those of this "
            f"{type(mcmc.kernel).__name__} move by each other: judge a run of Exchange with the "
            "same auxiliary draws"
        )
    if target.each is not None:
        raise ValueError(
            "exchange_diagnostics judges draws of one posterior, got data for each chain: run one "
            "data set"
        )
    num_chains, num_draws = draws.shape[:2]
    every = -(-num_draws * min(num_chains, max_draws) // max_draws)
    draws = draws[:max_draws].flip(1)[:, ::every].flip(1)
    per_chain = -(-MIN_BLOCKS // num_chains)
    length = draws.shape[1] // per_chain
    if length == 0:
        raise ValueError(
            f"exchange_diagnostics needs at least {MIN_BLOCKS} draws of all chains together, "
            f"got {draws.shape[0] * draws.shape[1]}: run more of them"
        )
    kept = draws[:, draws.shape[1] - per_chain * length :]
    return target, kept.reshape(-1, length, draws.shape[-1])


def _largest_rhat(draws: Tensor) -> float:
    """Of all coordinates, ``(C, N, D)``; NaN where there are too few draws to have one."""
    if draws.shape[1] < 4:
        return math.nan
    return worst_rhat(draws.transpose(0, 1))


def _words(auxiliary: Auxiliary, number: int) -> str:
    if auxiliary.is_exact:
        return f"{number} exact auxiliary draws each"
    sweeps = getattr(auxiliary, "num_sweeps", "some")
    return f"{number} auxiliary draws each by {sweeps} sweeps from {auxiliary.origin}"


# --- the identities


def bartlett(target: ExchangeTarget, q: Tensor, auxiliary: Auxiliary, number: int) -> Bartlett:
    """Returns score and second identity at positions ``(n, D)``, by ``number`` draws at each.

    Args:
        target: The model, without its log Z's.
        q: Positions.
        auxiliary: How auxiliary draws are made.
        number: M.
    """
    with pyro.validation_enabled(is_validate=False), torch.enable_grad():
        leaf = q.detach().requires_grad_()
        naturals = target.naturals_with_graph(leaf)
        drawn = [_statistics(target, naturals, auxiliary) for _ in range(number)]
        pulled = torch.stack([_pulled(naturals, values, leaf) for values in drawn], 1)
        mean = {name: torch.stack([values[name] for values in drawn]).mean(0) for name in naturals}
        gradient, hessian = _derivatives(target, naturals, mean, leaf)
    centred = pulled - pulled.mean(1, keepdim=True)
    covariance = centred.mT @ centred / (number - 1)
    outer = gradient[:, :, None] * gradient[:, None, :]
    return Bartlett(-gradient, outer - hessian - (1.0 + 1.0 / number) * covariance)


@torch.no_grad()
def _statistics(target: ExchangeTarget, naturals: Values, auxiliary: Auxiliary) -> Values:
    """Statistics of one data set for every position, times the weights, ``(n,) + B + (p,)``."""
    found = {}
    for name, template in target.energies.items():
        family = template.with_natural(naturals[name].detach())
        y = auxiliary.draw(family, target.observed[name])
        found[name] = target.weighted(name, template.statistics(y), event_dim=1)
    return found


def _pulled(naturals: Values, statistics: Values, leaf: Tensor) -> Tensor:
    """The statistics' gradient with respect to q, ``(n, D)``: their covariance there is J'Cov J."""
    total = (0.0 * leaf).sum()  # natural parameters of some sites may be constants
    for name, natural in naturals.items():
        total = total + (natural * statistics[name].to(natural.dtype)).sum()
    return torch.autograd.grad(total, leaf, retain_graph=True)[0]


def _derivatives(
    target: ExchangeTarget, naturals: Values, mean: Values, leaf: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient ``(n, D)`` and Hessian ``(n, D, D)`` of U and the natural parameters at E T held."""
    total = target.potential(leaf).sum()
    for name, natural in naturals.items():
        total = total + (natural * mean[name].to(natural.dtype)).sum()
    (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
    rows = [
        torch.autograd.grad(g.sum(), leaf, retain_graph=True, materialize_grads=True)[0]
        for g in gradient.unbind(1)
    ]
    return gradient.detach(), torch.stack(rows, 1)


def _whitened(q: Tensor, found: Bartlett) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, scores and second identity where the draws have unit covariance, in float64."""
    q = q.double()
    root, failed = torch.linalg.cholesky_ex(torch.atleast_2d(q.T.cov()))
    if bool(failed) or not bool(torch.isfinite(root).all()):
        raise ValueError("the draws stand still in some direction: run longer")
    x = torch.linalg.solve_triangular(root, (q - q.mean(0)).T, upper=False).T
    return x, found.score.double() @ root, root.T @ found.second.double() @ root


# --- the two statistics


def _resolution(means: Tensor, score: Tensor) -> float:
    """The standard error of a standard deviation, relative to it, that curvature gives.

    Draws of variance v where the posterior's is 1 have s s' + H of mean v - 1, in units of the
    information, which is the mean of s s' over the posterior.
    """
    spread = means.diagonal(dim1=-2, dim2=-1).std(0) / len(means) ** 0.5
    return 0.5 * float((spread / score.square().mean(0)).max())


def _entries(second: Tensor) -> Tensor:
    """The entries that so many blocks can judge: all, the diagonal, or its mean, ``(B, r)``."""
    num_blocks, dim = second.shape[0], second.shape[-1]
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    if dim * (dim + 1) // 2 * _BLOCKS_PER_ENTRY <= num_blocks:
        rows, columns = torch.tril_indices(dim, dim)
        return second[..., rows, columns]
    return diagonal if dim * _BLOCKS_PER_ENTRY <= num_blocks else diagonal.mean(-1, keepdim=True)


def _signs(num_blocks: int, like: Tensor) -> Tensor:
    """Random signs of blocks, which leave a law as it is where its mean is zero, ``(R, B)``."""
    coins = torch.randint(2, (NUM_SIGNS, num_blocks), device=like.device)
    return (2.0 * coins - 1.0).to(like.dtype)


def _hotelling(means: Tensor, signs: Tensor) -> tuple[float, float]:
    r"""T squared of the mean of independent rows ``(B, r)``, and its quantile by random signs.

    Signs do not change the second moments G, and T squared is an increasing function of
    :math:`c^\top G^{-1} c` with the sum c of the rows.
    """
    second, num = means.T @ means, len(means)
    shares = [_quadratic(sums, second) / num for sums in (means.sum(0)[None], signs @ means)]
    found, null = ((num - 1) * share / (1.0 - share) for share in shares)
    return float(found), float(null.quantile(1.0 - LEVEL))


def _quadratic(rows: Tensor, matrix: Tensor) -> Tensor:
    return (torch.linalg.solve(matrix, rows.T).T * rows).sum(-1)


def _stein(kernel: Tensor, length: int, signs: Tensor) -> tuple[float, float]:
    """The mean over pairs of draws of different blocks, and its p-value by random signs."""
    num_blocks = signs.shape[1]
    sums = kernel.reshape(num_blocks, length, num_blocks, length).sum((1, 3))
    sums = sums - sums.diagonal().diag()
    larger = ((signs @ sums) * signs).sum(1) >= sums.sum()
    pairs = num_blocks * (num_blocks - 1) * length**2
    return float(sums.sum()) / pairs, (1.0 + float(larger.sum())) / (1.0 + NUM_SIGNS)
