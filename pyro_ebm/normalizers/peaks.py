r"""Where a density in a few coordinates is high, and how narrow it is there.

From many points, those of a scatter with Cauchy tails among them, the density is climbed by steps
whose length adapts along every coordinate to the sign of its slope alone, so that a mode's scale
need not be known. Of what is reached the highest points are kept, each with the distance along
every coordinate at which the density has fallen by half a nat: the standard deviation of a
Gaussian, its other coordinates held.

A mode whose slopes reach none of the points stays unseen.

Reference:
    Riedmiller, Braun, A direct adaptive method for faster backpropagation learning: the RPROP
    algorithm, IEEE International Conference on Neural Networks, 1993.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_ebm.ops.autograd import grad_of
from pyro_ebm.ops.log_space import NEGLIGIBLE

NUM_SCATTERED = 512
_NUM_STEPS = 50
_LONGER, _SHORTER = 1.6, 0.4
_MAX_PEAKS = 40
_NEAR = 2.0  # widths around a peak within which others are the same one
_EXPONENTS = torch.arange(-34.0, 50.0)  # of two: distances that are tried for a width
_FALL = 0.5

LogDensity = Callable[[Tensor], Tensor]


class Peaks(NamedTuple):
    """Points where a density is high.

    Args:
        at: ``(K, D)``.
        width: How far from each it has fallen by half a nat, ``(K, D)``.
        height: Its logarithm there, ``(K,)``.
    """

    at: Tensor
    width: Tensor
    height: Tensor


def scattered(like: Tensor) -> Tensor:
    """Returns points with Cauchy tails around others, ``(NUM_SCATTERED, D)``, the same every time.

    Args:
        like: Points whose middle and spread they take, ``(N, D)``.
    """
    share = SobolEngine(like.shape[1]).draw(NUM_SCATTERED, dtype=torch.float64)
    share = (share + 0.5 / NUM_SCATTERED).to(like)
    low, middle, high = like.quantile(like.new_tensor([0.25, 0.5, 0.75]), 0)
    return middle + (high - low).clamp_min(1e-6) * torch.tan(math.pi * (share - 0.5))


def find_peaks(log_density: LogDensity, starts: Tensor) -> Peaks:
    """Returns the peaks that are reached from some points, without those of negligible mass.

    Args:
        log_density: The log density in nats at points ``(N, D)``, ``(N,)``; NaN counts as nothing.
        starts: Where to begin, ``(N, D)``.

    Returns:
        At most 40 of them; none where the density is not finite at any start.

    Example:
        >>> at = find_peaks(lambda u: -0.5 * (u[:, 0] - 3.0) ** 2, torch.randn(9, 1)).at
        >>> bool((at - 3.0).abs().max() < 1e-2)
        True
    """
    at, height = _climbed(_finite(log_density), starts)
    kept: list[int] = []
    widths: list[Tensor] = []
    left = height > -torch.inf
    while bool(left.any()) and len(kept) < _MAX_PEAKS:
        best = int(torch.where(left, height, -torch.inf).argmax())
        width = _width(log_density, at[best], height[best])
        left = left & ((at - at[best]).abs() > _NEAR * width).any(1)
        kept.append(best)
        widths.append(width)
    if not kept:
        return Peaks(at[:0], at[:0], height[:0])
    return _weighty(Peaks(at[kept], torch.stack(widths), height[kept]))


def _weighty(peaks: Peaks) -> Peaks:
    """Those whose mass is not negligible beside that of the largest."""
    log_mass = peaks.height + peaks.width.double().log().sum(1)
    counts = log_mass >= log_mass.max() - NEGLIGIBLE
    return Peaks(*(part[counts] for part in peaks))


def _finite(log_density: LogDensity) -> LogDensity:
    def finite(u: Tensor) -> Tensor:
        value = log_density(u)
        return torch.where(value < torch.inf, value, -torch.inf)  # NaN is not smaller either

    return finite


def _climbed(log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
    """Points uphill of some, ``(N, D)``, and their heights."""
    try:
        height, slope = grad_of(log_density, u)
    except ValueError:  # no slope to climb by: the points themselves are all there is
        with torch.no_grad():
            return u, log_density(u)
    step = 0.1 * (u - u.median(0).values).abs().clamp_min(0.1)
    for _ in range(_NUM_STEPS):
        trial = u + step * slope.nan_to_num(0.0).sign()
        value, new_slope = grad_of(log_density, trial)
        better = (value > height)[:, None]
        turned = new_slope.sign() != slope.sign()
        step = step * torch.where(better & ~turned, _LONGER, _SHORTER)
        u, slope = torch.where(better, trial, u), torch.where(better, new_slope, slope)
        height = torch.where(better[:, 0], value, height)
    return u, height


def _width(log_density: LogDensity, at: Tensor, height: Tensor) -> Tensor:
    """Of both sides the larger distance to a fall of half a nat, ``(D,)``."""
    scales = torch.exp2(_EXPONENTS).to(at)
    away = scales[:, None, None] * torch.eye(len(at)).to(at)
    points = at + torch.stack([away, -away])  # (2, scales, D, D)
    with torch.no_grad():
        heights = log_density(points.flatten(0, 2)).reshape(points.shape[:-1])
    fallen = ~(heights > height - _FALL)
    fallen[:, -1] = True
    return scales[fallen.int().argmax(1)].amax(0)
