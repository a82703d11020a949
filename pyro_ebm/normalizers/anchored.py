r"""Log Z as a function of its parameters, from draws at a few of them.

For an exponential family with statistics T and draws pooled from anchors :math:`\eta_1, \dots,
\eta_K`, :math:`N_k` of each,

.. math:: \hat Z(\eta) = \sum_n \frac{e^{\eta \cdot T_n}}{\sum_k N_k\, e^{\eta_k \cdot T_n} / Z_k},

where the :math:`Z_k` solve the same equation at the anchors (MBAR), up to one factor that they
share. With the draws held this is a smooth function with the right slope and curvature, so that HMC
and SVI may infer parameters through it; with one anchor it is Geyer and Thompson's Monte Carlo
likelihood.

**How far it holds.** The effective number S of draws at :math:`\eta`, of the weights above, falls
away from the anchors. With n observations of the law, the error of :math:`\log \hat Z` displaces
the posterior by about :math:`\sqrt{p n / S}` of its standard deviations. Where the effective share
is below :data:`~.displacement.MIN_SHARE` the function is NaN, and a kernel rejects what would
lead there.

References:
    Geyer, Thompson, Constrained Monte Carlo maximum likelihood for dependent data, JRSS B 54, 1992;
    Shirts, Chodera, Statistically optimal analysis of samples from multiple equilibrium states,
    Journal of Chemical Physics 129, 2008 (MBAR).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.normalizers.beyond import Beyond
from pyro_ebm.normalizers.chain_size import MIN_CHAINS, effective_size
from pyro_ebm.normalizers.displacement import MIN_SHARE, RowsServed, displacement, refuse
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.held_draws import HeldDraws
from pyro_ebm.ops.log_normalizer import LogNormalizer

MIN_SHARED = 5.0
"""Effective draws that link the anchors, as the curvature counts them."""

_ITERATIONS, _NEWTON_STEPS = 500, 100


class NoOverlapError(ValueError):
    """Hardly any draw of one group of anchors could be one of the others."""


class Anchored(HeldDraws):
    """Log Z of an exponential family from draws of its statistics at anchors.

    Args:
        anchors: Natural parameters, ``(K, p)``.
        statistics: Statistics of draws at each of them, ``(K, C, N, p)``, of C chains.
        log_normalizer: Log Z at the first anchor in nats, if it is known, or an estimate, whose
            standard error is then in that of evidence; else log Z is up to a constant, which
            inference does not see, and evidence does (:meth:`with_log_normalizer`).

    Attributes:
        is_relative: Whether that constant is missing.

    Raises:
        ValueError: If the shapes do not fit, or the anchors do not overlap.

    Example:
        >>> from pyro_ebm.energies import Ising
        >>> _ = torch.manual_seed(0)
        >>> family = Ising(0.0, (6, 6), periodic=False)
        >>> log_z = anchored(family, torch.tensor([[0.2]]), num_draws=2000)
        >>> change = log_z(torch.tensor([0.25])) - log_z(torch.tensor([0.2]))
        >>> exact = [Ising(k, (6, 6), periodic=False).log_normalizer() for k in (0.25, 0.2)]
        >>> bool((change - (exact[0] - exact[1])).abs() < 0.02)
        True
    """

    def __init__(
        self,
        anchors: Tensor,
        statistics: Tensor,
        *,
        log_normalizer: float | LogNormalizer | None = None,
    ) -> None:
        if statistics.dim() != 4 or statistics.shape[::3] != anchors.shape:
            raise ValueError(
                f"statistics must be (K, chains, draws, p) for anchors (K, p) = "
                f"{tuple(anchors.shape)}, got {tuple(statistics.shape)}"
            )
        self.anchors = anchors.detach().double()
        self.statistics = statistics.detach().double()
        self.is_relative = log_normalizer is None
        constant, self._error_of_constant = _known(log_normalizer)
        self._beyond = Beyond(
            "at parameters that the anchors say nothing of",
            "Add anchors (anchored_to places them)",
        )
        self._served = RowsServed("effective draws of the anchors", self.anchors.shape[1])
        self._counts = self._effective_counts()
        self._rows, self._log_counts = self._pooled()
        self.log_normalizers = self._solved() + constant
        self._log_mixture = self._mixture(self._rows, self.log_normalizers)

    def _effective_counts(self) -> Tensor:
        """What the draws of each anchor count for, ``(K,)``: of chains, fewer than there are."""
        sizes = [[effective_size(t) for t in s.unbind(-1)] for s in self.statistics]
        slowest = self.statistics.new_tensor(sizes)
        return slowest.nan_to_num(1.0).amin(-1)  # what does not move counts once

    def _mixture(self, rows: Tensor, log_z: Tensor) -> Tensor:
        """Log density of the pooled draws at statistics ``(n, p)``, per effective draw."""
        return torch.logsumexp(rows @ self.anchors.mT - log_z + self._counts.log(), -1)

    def _pooled(self) -> tuple[Tensor, Tensor]:
        """The different rows of all draws, ``(n, p)``, and what each counts for, in logs."""
        each = self._counts / (self.statistics.shape[1] * self.statistics.shape[2])
        weights = each.repeat_interleave(self.statistics[0, ..., 0].numel())
        rows, which = self.statistics.flatten(0, 2).unique(dim=0, return_inverse=True)
        return rows, weights.new_zeros(len(rows)).index_add_(0, which, weights).log()

    def _solved(self) -> Tensor:
        """Log Z at the anchors less that of the first, ``(K,)``: Newton's method with halvings."""
        log_z = self._iterated()
        value, slope, curvature = self._objective(log_z)
        for _ in range(_NEWTON_STEPS):
            if float(slope.abs().max()) < 1e-9 * float(self._counts.sum()):
                break
            step = torch.linalg.lstsq(curvature[1:, 1:], slope[1:, None]).solution[:, 0]
            step = torch.cat([step.new_zeros(1), step])
            while self._objective(log_z + step)[0] > value and float(step.abs().max()) > 1e-12:
                step = 0.5 * step
            log_z = log_z + step
            value, slope, curvature = self._objective(log_z)
        self._check_overlap(curvature)
        if not float(slope.abs().max()) < 1e-6 * float(self._counts.sum()):
            raise RuntimeError(
                f"log Z at {len(self.anchors)} anchors was not found in {_NEWTON_STEPS} steps: put "
                "them nearer to each other, or take more draws of each"
            )
        return log_z

    def _iterated(self) -> Tensor:
        """The same to a tenth of a nat, by iterating its equations, ``(K,)``.

        Far from the solution every draw belongs to one anchor alone, and no curvature tells Newton
        where to go.
        """
        scores, log_z = self._rows @ self.anchors.mT, torch.zeros_like(self._counts)
        for _ in range(_ITERATIONS):
            shares = self._log_counts - self._mixture(self._rows, log_z)
            new = torch.logsumexp(scores + shares[:, None], 0)
            new = new - new[0]
            moved, log_z = float((new - log_z).abs().max()), new
            if moved < 0.1:
                break
        return log_z

    def _objective(self, log_z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A convex function of log Z at the anchors, minus its slope, and its curvature."""
        scores = self._rows @ self.anchors.mT - log_z + self._counts.log()
        weights, share = self._log_counts.exp(), scores.softmax(-1)
        mass = weights @ share
        value = weights @ torch.logsumexp(scores, -1) + self._counts @ log_z
        curvature = torch.diag(mass) - (weights[:, None] * share).mT @ share
        return value, mass - self._counts, curvature

    def _check_overlap(self, curvature: Tensor) -> None:
        """Raises where hardly any draw of one group of anchors could be one of the others."""
        if len(curvature) > 1 and float(torch.linalg.eigvalsh(curvature)[1]) < MIN_SHARED:
            raise NoOverlapError(
                "the anchors do not overlap: put some between them, or take more draws of each"
            )

    # --- the function

    def value(self, natural: Tensor) -> Tensor:
        """Returns log Z in nats, ``(...)`` for natural parameters ``(..., p)``."""
        log_weights = self._log_weights(natural)
        value = torch.logsumexp(log_weights, -1)
        size = self._size(log_weights.detach())
        self._served.size = size
        held = size >= MIN_SHARE * self._counts.min()
        return self._beyond.told(value, held).to(natural.dtype)

    def serve(self, rows: Tensor) -> None:
        """Takes for how many rows log Z is subtracted, and warns where they are too many."""
        self._served.told(rows)

    def _log_weights(self, natural: Tensor) -> Tensor:
        scores = natural.double() @ self._rows.mT
        return scores - self._log_mixture + self._log_counts

    def _size(self, log_weights: Tensor) -> Tensor:
        """The effective number of independent draws behind weights."""
        shares = log_weights.softmax(-1)
        return 1.0 / (shares.square() / self._log_counts.exp()).sum(-1)

    def effective_size(self, natural: Tensor) -> Tensor:
        """Returns the effective number S of independent draws, ``(...)``, for ``(..., p)``."""
        return self._size(self._log_weights(natural))

    def share(self, natural: Tensor) -> Tensor:
        """Returns S as a share of the draws of an anchor, ``(...)``, for ``(..., p)``."""
        return self.effective_size(natural) / self._counts.min()

    def displacement(self, natural: Tensor, num_observations: int) -> Tensor:
        r"""Returns :math:`\sqrt{pn / S}`: about how far a posterior mean is off, in its own sd's.

        Args:
            natural: Where the posterior is, ``(..., p)``.
            num_observations: n, how often Z enters the likelihood.
        """
        size = self.effective_size(natural)
        return displacement(natural.shape[-1], num_observations, size)

    def check(self, natural: Tensor, num_observations: int) -> None:
        """Raises unless the draws are enough for these observations around here.

        Args:
            natural: Draws of the posterior, ``(..., p)``.
            num_observations: n.

        Raises:
            ValueError: If a posterior would be displaced by more than
                :data:`~.displacement.MAX_DISPLACEMENT` of its standard deviations.
        """
        typical = float(self.displacement(natural, num_observations).median())
        draws = f"{float(self._counts.sum()):.0f} effective draws of the anchors"
        refuse(typical, draws, ", or anchors nearer to it")

    @property
    def num_parameters(self) -> int:
        """p, the number of natural parameters."""
        return self.anchors.shape[1]

    def changes(self, natural: Tensor, num_replicates: int) -> Tensor:
        """Returns by how much log Z of resampled chains differs, ``(num_replicates, ...)``.

        Args:
            natural: Natural parameters, ``(..., p)``.
            num_replicates: How often chains are resampled.
        """
        here = self(natural)
        return torch.stack([copy(natural) - here for copy in self.bootstrap(num_replicates)])

    def bootstrap(self, num_replicates: int) -> list[Anchored]:
        """Returns functions made of resampled chains, which show the error of this one.

        Args:
            num_replicates: Their number.

        Raises:
            ValueError: If there are too few chains to be resampled: the error would come out small.
        """
        if self.statistics.shape[1] < MIN_CHAINS:
            raise ValueError(
                f"a bootstrap resamples chains, and there are {self.statistics.shape[1]} at each "
                f"anchor: draw by at least {MIN_CHAINS} (independent draws are chains of one)"
            )
        num_anchors, num_chains = self.statistics.shape[:2]
        which = torch.randint(num_chains, (num_replicates, num_anchors, num_chains))
        rows = torch.arange(num_anchors)[:, None]
        resampled = (self.statistics[rows, chains] for chains in which)
        firsts = self._redrawn_constants(num_replicates)
        return [
            Anchored(self.anchors, each, log_normalizer=first)
            for each, first in zip(resampled, firsts, strict=True)
        ]

    def _redrawn_constants(self, num_replicates: int) -> list[float] | list[None]:
        """Log Z at the first anchor within its own error, for each replicate."""
        if self.is_relative:
            return [None] * num_replicates
        noise = self._error_of_constant * torch.randn(num_replicates, dtype=torch.float64)
        return (float(self.log_normalizers[0]) + noise).tolist()

    def with_log_normalizer(self, log_normalizer: float | LogNormalizer) -> Anchored:
        """Returns the same function with its constant, which evidence needs.

        Args:
            log_normalizer: Log Z at the first of :attr:`anchors` in nats, or an estimate of it.

        Example:
            >>> from pyro_ebm import EnergyDistribution
            >>> from pyro_ebm.energies import Edges, ExponentialRandomGraph, Triangles
            >>> from pyro_ebm.normalizers import from_uniform
            >>> _ = torch.manual_seed(0)
            >>> family = ExponentialRandomGraph([-1.0, 0.0], 7, [Edges(), Triangles()])
            >>> anchors = torch.tensor([[-1.0, 0.0], [-1.0, 0.1]])
            >>> log_z = anchored(family, anchors, num_draws=500, start=torch.zeros(21))
            >>> first = family.with_natural(log_z.anchors[0].float())
            >>> log_z = log_z.with_log_normalizer(from_uniform(EnergyDistribution(first)))
            >>> exact = 21 * torch.tensor(-1.0).exp().log1p()  # ties are independent there
            >>> bool((log_z(anchors[0]) - exact).abs() < 0.2)
            True
        """
        return Anchored(self.anchors, self.statistics, log_normalizer=log_normalizer)


def _known(log_normalizer: float | LogNormalizer | None) -> tuple[float, float]:
    """Log Z in nats and its standard error; zero where it is not known."""
    if not isinstance(log_normalizer, LogNormalizer):
        return log_normalizer or 0.0, 0.0
    error = log_normalizer.stderr
    return float(log_normalizer.value), 0.0 if error is None else float(error)


def anchored(
    family: ExponentialFamily,
    anchors: Tensor,
    *,
    num_draws: int = 1000,
    num_chains: int = 100,
    burn_in: int = 200,
    start: Tensor | None = None,
) -> Anchored:
    """Returns log Z of a family as a function of its natural parameters, from draws at anchors.

    Args:
        family: The family; its own parameters are of no account.
        anchors: Natural parameters, ``(K, p)``.
        num_draws: Draws at each anchor, over all chains.
        num_chains: Chains at each anchor, where draws are not exact.
        burn_in: Sweeps before the first draw; one sweep lies between two draws of a chain.
        start: Where chains start, ``event_shape``; needed where draws are not exact.

    Raises:
        TypeError: If the family has neither an exact sampler nor sweeps.
        ValueError: If draws are not exact and there is no start.
    """
    if not (family.is_sampleable or family.has_sweep):
        raise TypeError(
            f"{type(family).__name__} has neither an exact sampler nor sweeps of its own law (what "
            "a class inherits that changes the energy are those of another): define sample() or "
            "sweep() beside it"
        )
    anchors = anchors.double()
    laws = family.with_natural(anchors)
    num_chains = min(num_chains, whole("num_draws", num_draws, least=2))
    if family.is_sampleable:
        x = laws.sample((num_draws, 1))  # (C, N, K) + event: independent draws are chains of one
        drawn = family.statistics(x).movedim(2, 0)
    else:
        shape = (num_chains, -(-num_draws // num_chains))
        drawn = _by_sweeps(family, anchors, shape, burn_in, start)
    if not family.is_tractable:
        return Anchored(anchors, drawn)
    known = family.with_natural(anchors[0]).log_normalizer()
    return Anchored(anchors, drawn, log_normalizer=float(known))


def _by_sweeps(
    family: ExponentialFamily,
    anchors: Tensor,
    shape: tuple[int, int],
    burn_in: int,
    start: Tensor | None,
) -> Tensor:
    """Statistics of chains, ``(K, C, N, p)``."""
    if start is None:
        raise ValueError(
            f"{type(family).__name__} has no exact sampler: give start=, such as the data"
        )
    laws = family.with_natural(anchors[:, None].expand(-1, shape[0], -1))
    x = laws.sweep(start.expand(laws.batch_shape + family.event_shape), burn_in)
    drawn = []
    for _ in range(shape[1]):
        x = laws.sweep(x, 1)
        drawn.append(family.statistics(x))
    return torch.stack(drawn, 2)
