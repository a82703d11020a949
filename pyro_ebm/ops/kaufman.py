r"""Log Z of the Ising model on a torus without a field, in closed form (Kaufman).

For :math:`p(s) \propto \exp(K \sum_{<ij>} s_i s_j)` on n by m sites, with :math:`\gamma_q \ge 0`
given by

.. math::
    \cosh\gamma_q = \frac{\cosh^2 2K}{\sinh 2K} - \cos\frac{\pi q}{n}, \qquad
    \gamma_0 = 2K + \log\tanh K \text{ with its sign},

.. math::
    Z = \tfrac12 (2 \sinh 2K)^{nm/2} \Big[
        \prod_r 2\cosh\tfrac{m\gamma_{2r+1}}{2} + \prod_r 2\sinh\tfrac{m\gamma_{2r+1}}{2} +
        \prod_r 2\cosh\tfrac{m\gamma_{2r}}{2} + \prod_r 2\sinh\tfrac{m\gamma_{2r}}{2} \Big],

r from 0 to n - 1. The last product is negative below the critical coupling. Everything is kept in
logs, :math:`\gamma_q` by :math:`\cosh\gamma_q - 1 = (1 - \sinh 2K)^2 / \sinh 2K + 2\sin^2(\pi q /
2n)`, which loses no digits at the critical point.

Reference:
    Kaufman, Crystal statistics II, Physical Review 76, 1949.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["torus_log_normalizer"]

_WEAK = 1e-5  # coupling below which loops around plaquettes are under rounding


def torus_log_normalizer(coupling: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns log Z in nats, differentiable in the coupling, of its shape.

    Args:
        coupling: K, any shape. Negative ones are those of an antiferromagnet, which equals the
            ferromagnet where both sides are even; else the result is NaN.
        shape: Numbers of sites along both sides, at least 3 each.

    Example:
        >>> torus_log_normalizer(torch.tensor(0.4, dtype=torch.float64), (4, 4))
        tensor(14.5611, dtype=torch.float64)
    """
    n, m = shape
    k = coupling.double().abs()
    weak = k < _WEAK
    strong = torch.where(weak, 1.0, k)
    weakly = n * m * (math.log(2.0) + coupling.double().square())  # two bonds a site
    log_z = torch.where(weak, weakly, _log_normalizer(strong, n, m))
    if n % 2 or m % 2:
        log_z = torch.where(coupling < 0, torch.nan, log_z)
    return log_z.to(coupling.dtype)


def _log_normalizer(k: Tensor, n: int, m: int) -> Tensor:
    s = torch.sinh(2.0 * k)
    odd = 0.5 * m * _gammas(s, n, 1)
    even = 0.5 * m * _gammas(s, n, 2)  # without q = 0
    zero = m * (k + 0.5 * torch.log(torch.tanh(k)))
    first, second = _log_2cosh(odd).sum(-1), _log_2sinh(odd).sum(-1)
    third = _log_2cosh(even).sum(-1) + _log_2cosh(zero.abs())
    fourth = _log_2sinh(even).sum(-1)  # times 2 sinh(zero), which has a sign
    parts = torch.stack([first, second, third, fourth + zero, fourth - zero])
    largest = parts.detach().max(0).values
    signs = parts.new_tensor([1.0, 1.0, 1.0, 1.0, -1.0]).reshape((-1,) + (1,) * k.dim())
    bracket = largest + torch.log((signs * torch.exp(parts - largest)).sum(0))
    return bracket - math.log(2.0) + 0.5 * n * m * torch.log(2.0 * s)


def _gammas(s: Tensor, n: int, first: int) -> Tensor:
    """Gamma at q = first, first + 2, ... below 2n, along a new last dim."""
    q = torch.arange(first, 2 * n, 2, dtype=s.dtype, device=s.device)
    above_one = ((1.0 - s).square() / s).unsqueeze(-1) + 2.0 * torch.sin(math.pi * q / (2 * n)) ** 2
    return torch.log1p(above_one + torch.sqrt(above_one * (above_one + 2.0)))


def _log_2cosh(a: Tensor) -> Tensor:
    return a + torch.log1p(torch.exp(-2.0 * a))


def _log_2sinh(a: Tensor) -> Tensor:
    return a + torch.log(-torch.expm1(-2.0 * a))
