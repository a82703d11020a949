r"""The log of a sum over the nonnegative integers, with a bound on everything that is left out.

.. math:: S = \sum_{j=0}^\infty g(j), \qquad \log g \text{ concave}.

A window of integers from L on is summed in two ways that fade into each other, :math:`g = g w + g
(1 - w)`, with :math:`w(x) = \tfrac12 \operatorname{erfc}((x - c) / h)`. The first part, short, is
summed one by one. The second is cut into cells of s integers, and a cell counts as s times the
value at its middle: fine where s is well below h and below the width of g. (A window without a
thick left end needs no first part, and s may then be large.) What is missing is at most the sum of

- the tails. Ratios of successive terms fall, so beyond U the terms are under a geometric series,

  .. math:: \sum_{j > U} g(j) \le g(U + 1) \Big/ \Big(1 - \frac{g(U + 2)}{g(U + 1)}\Big),

  and likewise below L;
- the ends of the fade, which are cut off at :math:`|x - c| = 5.5 h`: :math:`\tfrac12
  \operatorname{erfc}(5.5) S`;
- where :math:`s > 1`, the coarseness. Let :math:`g (1 - w)` be analytic to the right of some point
  below A, where the cells begin, and grow off the real line by at most :math:`e^{\kappa y^2 / 2}`:
  if g does so with :math:`\kappa_g`, then :math:`\kappa = \kappa_g + 2 / h^2`, since
  :math:`|\operatorname{erfc}(u + iv)| \le e^{v^2} \operatorname{erfc}(u)`. The sum over the middles
  is the integral of :math:`g (1 - w) \cot(\pi (z - x_0) / s) / 2i` around the rectangle :math:`[A,
  B] \times [-a, a]`, with :math:`a = 2\pi / \kappa s`, and differs from :math:`\int_A^B g (1 - w)`
  by at most :math:`1 / \sinh q` of it from the long sides, :math:`q = 2 \pi^2 / \kappa s^2`, and
  s/2 times the function at A and at B from the short ones. So does the sum over all integers, with
  s = 1. Between the two there is at most

  .. math:: 10 e^{-q} S + (s + 1) [g(A) (1 - w(A)) + g(B)].

The number n of terms is a shape and does not depend on values, so that vmap and graphs can follow;
L and s are values.

Reference:
    Trefethen, Weideman, The exponentially convergent trapezoidal rule, SIAM Review 56, 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LogSeries", "log_series", "proven_log_series"]

LogTerm = Callable[[Tensor], Tensor]

TOLERANCE = 1e-12  # of what is left out, relative to the sum
MAX_TERMS = 2**13
_CUT = 5.5  # where the fade ends, in units of h
_CUT_OFF = 0.5 * math.erfc(_CUT)
_FINE = 27.0  # integers summed one by one for each integer of a cell


class LogSeries(NamedTuple):
    """The log of a sum and what is known of its error.

    Attributes:
        value: The log of the sum in nats, ``batch``, differentiable.
        log_remainder: The log of the bound on what is left out, relative to the sum, ``batch``. NaN
            where there is no bound.
    """

    value: Tensor
    log_remainder: Tensor


def log_series(
    log_term: LogTerm, first: Tensor, last: Tensor, *, curvature: LogTerm, num_terms: int
) -> LogSeries:
    r"""Returns the log of a sum over a window, with a bound on the rest.

    Args:
        log_term: log g in nats, concave from -1/2 on, at numbers of shape ``batch + (n,)``.
        first: L, ``batch`` in float64: whole numbers, none negative.
        last: The least U, ``batch``. The window reaches further where it takes that to fill cells.
        curvature: :math:`\kappa_g` at A, of and in shape ``batch``.
        num_terms: n, at least 2.

    Example:
        >>> from math import log
        >>> halves = lambda j: -j * log(2.0)
        >>> ends = torch.tensor(0.0), torch.tensor(60.0)
        >>> found = log_series(halves, *ends, curvature=lambda x: 0 * x, num_terms=128)
        >>> round(found.value.exp().item(), 5)
        2.0
    """
    cells = _Cells(first, last, num_terms)
    at, log_weight = cells.terms()
    value = torch.logsumexp(log_term(at) + log_weight, -1)
    with torch.no_grad():
        parts = [
            _tails(log_term, first, cells.end),
            cells.log_cut_off + value.detach(),
            _coarseness(log_term, cells, curvature, value.detach()),
        ]
        remainder = torch.logsumexp(torch.stack(parts), 0) - value.detach()
    return LogSeries(value, remainder)


class _Cells:
    """Where terms are taken, and what each of them counts.

    Args:
        first: L, ``batch``.
        last: The least U, ``batch``.
        num_terms: n.
    """

    def __init__(self, first: Tensor, last: Tensor, num_terms: int) -> None:
        num_single = num_terms // 2
        self.first = first
        self.single = torch.arange(num_single, dtype=first.dtype, device=first.device)
        self.cells = torch.arange(num_terms - num_single, dtype=first.dtype, device=first.device)
        self.stride = torch.ceil((last - first + 1.0) / len(self.cells)).clamp(min=1.0)
        self.fades = num_single >= _FINE * self.stride
        skipped = num_single // 4  # cells begin where g is smoother than at its end
        self.center = 0.5 * (skipped + num_single - 1)
        self.width = (num_single - skipped) / (2.0 * _CUT)  # h
        self.skipped = torch.where(self.fades, float(skipped), 0.0)

    def terms(self) -> tuple[Tensor, Tensor]:
        """Returns numbers j and the logs of what their terms count, ``batch + (n,)`` each."""
        stride, fades = self.stride.unsqueeze(-1), self.fades.unsqueeze(-1)
        middles = self.skipped.unsqueeze(-1) + stride * (self.cells + 0.5) - 0.5
        single = self.single.expand(middles.shape[:-1] + self.single.shape)
        out = torch.where(fades, self._log_fade(single), -torch.inf)
        back = torch.where(fades, self._log_fade(2.0 * self.center - middles), 0.0)
        at = self.first.unsqueeze(-1) + torch.cat([single, middles], -1)
        return at, torch.cat([out, back + torch.log(stride)], -1)

    def _log_fade(self, x: Tensor) -> Tensor:
        """The log of w, which falls from 1 to 0; that of 1 - w is its mirror image."""
        return torch.log(0.5 * torch.erfc((x - self.center) / self.width))

    @property
    def begin(self) -> Tensor:
        """The first integer in a cell, ``batch``; A is one half below."""
        return self.first + self.skipped

    @property
    def end(self) -> Tensor:
        """The first integer that is not in the window, ``batch``; B is one half below."""
        return self.begin + self.stride * len(self.cells)

    @property
    def log_cut_off(self) -> Tensor:
        """The log of the bound on the ends of the fade, relative to the sum, ``batch``."""
        return torch.where(self.fades, math.log(_CUT_OFF), -torch.inf)

    @property
    def added_curvature(self) -> Tensor:
        """What the fade adds to the curvature of g, ``batch``."""
        return torch.where(self.fades, 2.0 / self.width**2, 0.0)


def _tails(log_term: LogTerm, first: Tensor, end: Tensor) -> Tensor:
    """The log of the bound on what lies below ``first`` and from ``end`` on."""
    at = torch.stack([first - 1.0, first - 2.0, end, end + 1.0], -1).clamp(min=0.0)
    near_left, far_left, near_right, far_right = log_term(at).unbind(-1)
    # No more than L terms lie below L, none of them above the last.
    left = near_left + torch.minimum(torch.log(first), _log_geometric(far_left - near_left))
    return torch.logaddexp(left, near_right + _log_geometric(far_right - near_right))


def _log_geometric(log_ratio: Tensor) -> Tensor:
    """The log of ``1 / (1 - r)``; NaN where r is above 1."""
    return -torch.log(-torch.expm1(log_ratio))


def _coarseness(log_term: LogTerm, cells: _Cells, curvature: LogTerm, value: Tensor) -> Tensor:
    """The log of the bound on what cells of more than one integer miss."""
    rims = torch.stack([cells.begin, cells.end], -1) - 0.5
    left, right = log_term(rims).unbind(-1)
    thin = torch.where(cells.fades, math.log(_CUT_OFF), 0.0)
    sides = torch.logaddexp(left + thin, right) + torch.log(cells.stride + 1.0)
    spread = (curvature(rims[..., 0]) + cells.added_curvature) * cells.stride.square()
    inside = value + math.log(10.0) - 2.0 * math.pi**2 / spread
    return torch.where(cells.stride > 1.0, torch.logaddexp(inside, sides), -torch.inf)


def proven_log_series(
    log_term: LogTerm, first: Tensor, last: Tensor, *, curvature: LogTerm, num_terms: int
) -> Tensor:
    """Returns the log of the sum in nats, NaN where more than 1e-12 of it may be missing.

    Args:
        log_term: As in :func:`log_series`.
        first: Likewise.
        last: Likewise; NaN or infinity where there is no window.
        curvature: Likewise.
        num_terms: Terms to begin with. Where values can be read, as they cannot under vmap, their
            number is raised, up to 8192, until it is enough.

    Example:
        >>> square = lambda j: -(j - 40.0).square() / 50.0
        >>> ends = torch.tensor(0.0).double(), torch.tensor(90.0).double()
        >>> proven_log_series(square, *ends, curvature=lambda x: 0 * x + 1 / 25, num_terms=64).exp()
        tensor(12.5331, dtype=torch.float64)
    """
    found = log_series(log_term, first, last, curvature=curvature, num_terms=num_terms)
    while num_terms < MAX_TERMS and _would_gain(found, last - first, num_terms):
        num_terms = 4 * num_terms
        found = log_series(log_term, first, last, curvature=curvature, num_terms=num_terms)
    return torch.where(_is_proven(found), found.value, torch.nan)


def _is_proven(found: LogSeries) -> Tensor:
    return found.log_remainder < math.log(TOLERANCE)


def _would_gain(found: LogSeries, width: Tensor, num_terms: int) -> bool:
    """Whether some window is still coarse and not proven; ``False`` where nobody can tell."""
    coarse = (width >= num_terms // 2) & torch.isfinite(width)
    try:
        return bool((coarse & ~_is_proven(found)).any())
    except RuntimeError:  # vmap and graphs have no values
        return False
