r"""The Conway–Maxwell–Poisson law of counts, narrower or wider than a Poisson law.

.. math:: E(x) = -x \log\lambda + \nu \log x!, \qquad x = 0, 1, 2, \dots

:math:`\nu = 1` is Poisson with mean :math:`\lambda`, :math:`\nu = 0` with :math:`\lambda < 1`
geometric, :math:`\nu \to \infty` Bernoulli with odds :math:`\lambda`. The mode is at
:math:`\mu = \lambda^{1/\nu}`, rounded down, and far from zero the variance is about :math:`\mu /
\nu`.

**Log Z** has no closed form. The terms of the sum are log-concave, and Stirling's formula puts them
under :math:`e^{-t}` of the largest where :math:`\nu \mu h(j / \mu) > t`, :math:`h(r) = r \log r - r
+ 1`: :mod:`pyro_ebm.ops.series` sums the window that this leaves and proves what it leaves out.
What that needs to know beyond the terms is :math:`\kappa = \nu \psi'(A + 1)`, from
:math:`|\Gamma(x) / \Gamma(x + iy)|^2 = \prod_k (1 + y^2 / (x + k)^2) \le e^{y^2 \psi'(x)}`.

**Draws** are by rejection: from a Poisson law of mean :math:`\mu` for :math:`\nu \ge 1`, from a
geometric law below. Either way the log of target over envelope is :math:`a
y - b \log y!` up to a constant, which is largest at :math:`\lfloor e^{a/b} \rfloor`.

References:
    Shmueli, Minka, Kadane, Borle, Boatwright, A useful distribution for fitting discrete data,
    Journal of the Royal Statistical Society C 54, 2005; Benson, Friel, Bayesian inference, model
    selection and likelihood estimation using fast rejection sampling: the Conway–Maxwell–Poisson
    distribution, Bayesian Analysis 16, 2021, arXiv:1709.03471.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.energies.exponential_family import ExponentialFamily
from pyro_ebm.ops.log_space import NEGLIGIBLE
from pyro_ebm.ops.series import proven_log_series

_ROUNDING = 1e-6  # nats of it in the terms, beyond which log Z is refused
_NEWTON_STEPS = 6
_MAX_ROUNDS = 10_000
_PROPOSALS = 1024  # a round, or more if more draws are missing


class ConwayMaxwellPoisson(ExponentialFamily):
    r"""Conway–Maxwell–Poisson law of a count.

    E and log Z are each of the size of :math:`\nu \log x!`, and of their difference float32 keeps
    little for counts in the hundreds: give float64 parameters and data there.

    Args:
        log_rate: :math:`\log\lambda`, shape ``batch``.
        dispersion: :math:`\nu \ge 0`, broadcasting with ``log_rate``; above 1 the law is narrower
            than Poisson. At 0 the log rate must be negative.
        num_terms: Terms of the sum for log Z where their number must not depend on values, as under
            vmap. 512 are proven for any mean from :math:`\nu = .05` on, 256 from .25 on.

    Raises:
        ValueError: If a number given as ``dispersion`` is negative, or 0 without a negative number
            as ``log_rate``; if there are fewer than 2 terms.

    Example:
        >>> energy = ConwayMaxwellPoisson(torch.tensor([1.0, 4.0]).log(), 1.0)
        >>> energy.log_normalizer()  # at dispersion 1 the Poisson mean
        tensor([1., 4.])
        >>> energy(torch.tensor(2.0))
        tensor([ 0.6931, -2.0794])
    """

    log_rate: Tensor
    dispersion: Tensor
    coefficients = ("log_rate", "dispersion")
    is_tractable = True
    is_sampleable = True

    def __init__(
        self, log_rate: float | Tensor, dispersion: float | Tensor, *, num_terms: int = 512
    ) -> None:
        super().__init__((), constraints.nonnegative_integer)
        _check_numbers(log_rate, dispersion)
        if num_terms < 2:
            raise ValueError(f"num_terms must be at least 2, got {num_terms}")
        self.num_terms = num_terms
        self._set("log_rate", log_rate)
        self._set("dispersion", dispersion)

    def statistics(self, x: Tensor) -> Tensor:
        """Returns x and -log x!, ``(..., 2)``."""
        x = x if x.is_floating_point() else x.to(self.log_rate.dtype)
        return torch.stack([x, -torch.lgamma(x + 1.0)], -1)

    def _pair(self) -> tuple[Tensor, Tensor]:
        log_rate, dispersion = torch.broadcast_tensors(self.log_rate, self.dispersion)
        return log_rate.double(), dispersion.double()

    # --- the sum

    def log_normalizer(self) -> Tensor:
        r"""Returns log Z in nats, ``batch``, differentiable in both parameters.

        NaN where it is infinite, for :math:`\nu < 0` and for :math:`\nu = 0` with
        :math:`\lambda \ge 1`; where 8192 terms, under vmap ``num_terms``, do not prove that less
        than 1e-12 of Z is missing; and where rounding of the terms, whose logs are of the size of
        :math:`\nu \log \mu!`, is above 1e-6, that is beyond :math:`5 \cdot 10^9` of it.
        """
        log_rate, dispersion = self._pair()
        top, first, last = _window(log_rate.detach(), dispersion.detach())
        log_factorial = torch.lgamma(top + 1.0)

        def log_term(j: Tensor) -> Tensor:
            """Relative to the largest, lest the weights of a large sum lose their digits."""
            log_ratio = torch.lgamma(j + 1.0) - log_factorial.unsqueeze(-1)
            up = j - top.unsqueeze(-1)
            return up * log_rate.unsqueeze(-1) - log_ratio * dispersion.unsqueeze(-1)

        log_sum = proven_log_series(
            log_term,
            first,
            last,
            curvature=lambda x: dispersion.detach() * torch.polygamma(1, x + 1.0),
            num_terms=self.num_terms,
        )
        largest = top * log_rate - log_factorial * dispersion
        return (largest + log_sum).to(self.natural().dtype)

    # --- draws

    @torch.no_grad()
    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws, ``shape + batch``; NaN for improper laws and those rounding spoils.

        Dispersions from 1 on accept one proposal in about the square root of the dispersion at any
        mean; those below 1 fewer and fewer as the mean grows, one in a hundred at 10 000.

        Args:
            shape: Shape of the sample.

        Raises:
            RuntimeError: If some draws are not accepted within 10 000 rounds.
        """
        log_rate, dispersion = self._pair()
        shape = torch.Size(shape) + log_rate.shape
        envelope = _Envelope(log_rate.expand(shape).flatten(), dispersion.expand(shape).flatten())
        return envelope.sample().reshape(shape).to(self.natural().dtype)

    @torch.no_grad()
    def sweep(self, x: Tensor, num_sweeps: int) -> Tensor:
        """Returns counts after Metropolis steps of one up or one down, ``x.shape``.

        The walk takes about as many steps to forget where it started as the law has variance.

        Args:
            x: Counts, whose shape ends in ``batch``.
            num_sweeps: Steps of every count.
        """
        log_rate, dispersion = self._pair()
        at = x.double()
        for _ in range(num_sweeps):
            step = torch.where(torch.rand_like(at) < 0.5, -1.0, 1.0)
            to = at + step
            log_accept = step * (log_rate - dispersion * torch.log(torch.maximum(at, to)))
            accepted = (to >= 0) & (torch.log(torch.rand_like(at)) < log_accept)
            at = torch.where(accepted, to, at)
        return at.to(x.dtype)


def _check_numbers(log_rate: float | Tensor, dispersion: float | Tensor) -> None:
    if isinstance(dispersion, Tensor):
        return
    if not dispersion >= 0:
        raise ValueError(f"dispersion must not be negative, got {dispersion!r}")
    if dispersion == 0 and not isinstance(log_rate, Tensor) and not log_rate < 0:
        raise ValueError(
            f"log_rate must be negative where dispersion is 0, got {log_rate!r}: the terms of Z do "
            "not fall off"
        )


def _window(log_rate: Tensor, dispersion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top, first and last of the integers that count, ``batch`` each.

    The last is NaN where there is nothing to sum.
    """
    mode = torch.exp(log_rate / dispersion)
    low, high = _edges(NEGLIGIBLE / (dispersion * mode))
    geometric = torch.where(log_rate < 0, -NEGLIGIBLE / log_rate, torch.nan)
    first = (torch.floor(mode * low) - 1.0).clamp(min=0.0)
    last = torch.ceil(torch.fmin(mode * high, geometric)) + 1.0
    last = torch.where(_is_known(log_rate, dispersion, mode), last, torch.nan)
    return torch.floor(mode), first, last


def _is_known(log_rate: Tensor, dispersion: Tensor, mode: Tensor) -> Tensor:
    """Whether the law is proper and rounding leaves its terms what they are, ``batch``."""
    proper = (dispersion >= 0) & torch.isfinite(log_rate) & torch.isfinite(mode)
    rounding = torch.finfo(mode.dtype).eps * dispersion * torch.lgamma(mode + 1.0)
    return proper & (rounding <= _ROUNDING)


def _edges(depth: Tensor) -> tuple[Tensor, Tensor]:
    """Both r where r log r - r + 1 reaches ``depth``, from outside; 0 where it stays below."""
    low, high = torch.full_like(depth, 1e-3), 1.0 + depth / 3.0
    low = torch.maximum(low, 1.0 - torch.sqrt(2.0 * depth))  # h(1 - u) is above u^2 / 2,
    high = high + torch.sqrt(depth.square() / 9.0 + 2.0 * depth)  # h(1 + u) u^2 / (2 + 2u / 3)
    reaches = low * torch.log(low) - low + 1.0 > depth
    for _ in range(_NEWTON_STEPS):  # h is convex: from outside Newton's steps stay outside
        low, high = (r - (r * torch.log(r) - r + 1.0 - depth) / torch.log(r) for r in (low, high))
    return torch.where(reaches, low, 0.0), high


class _Envelope:
    """Laws that lie above the target up to a factor, one for each draw to be made.

    Args:
        log_rate: Flat.
        dispersion: Likewise.
    """

    def __init__(self, log_rate: Tensor, dispersion: Tensor) -> None:
        self.log_rate, self.dispersion = log_rate, dispersion
        mode = torch.exp(log_rate / dispersion)
        self.is_known = _is_known(log_rate, dispersion, mode)
        self.is_poisson = dispersion >= 1
        self.mean = torch.where(self.is_poisson, mode, 0.0)
        wide = torch.where(self.is_poisson, 0.5, dispersion)  # any number that has an envelope
        self.log_survival = _log_survival(log_rate, wide, mode)
        poisson = (dispersion - 1.0) / dispersion * log_rate, dispersion - 1.0
        geometric = log_rate - self.log_survival, dispersion
        self.slope, self.weight = (
            torch.where(self.is_poisson, one, other)
            for one, other in zip(poisson, geometric, strict=True)
        )
        top = torch.floor(torch.exp(self.slope / self.weight))
        falls = self.slope < 0  # exp is then rounded to 1 at very large weights
        self.top = torch.where((self.weight > 0) & ~falls, top, 0.0)

    def sample(self) -> Tensor:
        """Returns exact draws, one for each target."""
        result, missing = torch.full_like(self.log_rate, torch.nan), self.is_known.clone()
        num_rounds = 0
        while len(pending := missing.nonzero()[:, 0]) > 0:
            if num_rounds == _MAX_ROUNDS:
                raise RuntimeError(self._too_slow(pending))
            # Of several accepted for one draw any is kept, whatever its value.
            copies = max(_PROPOSALS, len(result)) // len(pending)
            rows, y = self._accepted(pending.repeat(copies))
            result[rows], missing[rows] = y, False
            num_rounds += 1
        return result

    def _too_slow(self, pending: Tensor) -> str:
        log_rate, dispersion = self.log_rate[pending].max(), self.dispersion[pending].min()
        return (
            f"{len(pending)} of {len(self.log_rate)} draws were not accepted within {_MAX_ROUNDS} "
            f"rounds, log_rate up to {float(log_rate):.3g} with dispersion down to "
            f"{float(dispersion):.3g}: use sweeps there"
        )

    def _accepted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Proposes once for each row; returns the rows that accept, with their draws."""
        y = self._propose(rows)
        log_u = torch.log(torch.rand_like(y))
        accepted = log_u < self.log_ratio(rows, y)
        return rows[accepted], y[accepted]

    def _propose(self, rows: Tensor) -> Tensor:
        mean = self.mean[rows]
        u = 1.0 - torch.rand_like(mean)  # never 0
        geometric = torch.floor(torch.log(u) / self.log_survival[rows])
        return torch.where(self.is_poisson[rows], torch.poisson(mean), geometric)

    def log_ratio(self, rows: Tensor, y: Tensor) -> Tensor:
        """Returns the log of target over envelope at y, at most 0."""
        slope, weight, top = self.slope[rows], self.weight[rows], self.top[rows]
        return slope * (y - top) - weight * (_log_factorial(y) - _log_factorial(top))


def _log_factorial(y: Tensor) -> Tensor:
    """Log y!, and 0 at 0 and 1, where a rounding of lgamma would count at large weights."""
    return torch.where(y > 1, torch.lgamma(y + 1.0), 0.0)


def _log_survival(log_rate: Tensor, dispersion: Tensor, mode: Tensor) -> Tensor:
    """The log of 1 - p of the geometric envelope.

    Where the rate is below 1 the geometric law with that ratio lies above too; the narrower is
    taken, which at dispersion 0 is the target itself.
    """
    stop = 2.0 * dispersion / (2.0 * mode * dispersion + 1.0 + dispersion)
    log_survival = torch.log1p(-stop)
    return torch.where(log_rate < 0, torch.minimum(log_survival, log_rate), log_survival)
