r"""Waymarks from data to noise, and how to space them.

.. math::
    x_k = \sqrt{1 - \alpha_k^2}\, x_0 + \alpha_k x_m, \qquad x_0 \sim p_{data},\ x_m \sim q,\
    0 = \alpha_0 < \dots < \alpha_m = 1 .

Neighbours are to be equally hard to tell apart. How hard is measured on Gaussians with the
waymarks' means and variances, along the path, by the Fisher–Rao metric coordinate by coordinate.

Rhodes, Xu and Gutmann, Telescoping density-ratio estimation, NeurIPS 2020, arXiv:2006.12204 (the
path; its spacing by length is ours).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Waymarks", "equal_steps"]

GRID = 4096  # mixing weights at which the path's length is measured, from 1e-6 to 1


class Waymarks(NamedTuple):
    """Points on the way from data to noise.

    Args:
        points: Shape ``(m,) + rows + event``; the last are draws of the noise.
        log_noise: The noise's log density in nats at both ends of the last bridge, ``(2,) + rows``.
    """

    points: Tensor
    log_noise: Tensor


@torch.no_grad()
def equal_steps(start: Tensor, end: Tensor, num_steps: int) -> Tensor:
    r"""Returns mixing weights whose Gaussian stand-ins are equally far apart.

    The length of the path is :math:`\int (\sum_j \dot\mu_j^2 / v_j + \tfrac12 \dot v_j^2 /
    v_j^2)^{1/2}\, d\alpha` with the mean :math:`\mu` and the variances :math:`v` of :math:`x_\alpha
    = \sqrt{1 - \alpha^2}\, x_0 + \alpha x_m`.

    Args:
        start: Data, ``(R,) + event``.
        end: Noise, shaped alike.
        num_steps: m.

    Returns:
        Weights :math:`\alpha_1 < \dots < \alpha_m = 1`, ``(m,)``.

    Raises:
        ValueError: If there are fewer than two rows, or rows that are not finite.

    Example:
        >>> near, far = 0.001 * torch.randn(20_000), torch.randn(20_000)
        >>> equal_steps(near, far, 3).log10().round(decimals=1)
        tensor([-2., -1., 0.])
    """
    if len(start) < 2:
        raise ValueError(
            "TelescopingNCE spaces its waymarks on the first batch, which has one row only: give "
            "waymarks="
        )
    ends = [u.reshape(len(u), -1) for u in (start, end)]
    (m0, m1), (v0, v1) = ([u.mean(0) for u in ends], [u.var(0) for u in ends])
    grid = torch.logspace(-6.0, 0.0, GRID, dtype=start.dtype, device=start.device)[:, None]
    keep = (1 - grid**2).clamp_min(0.0)  # the last is 0 up to rounding
    mean, variance = keep.sqrt() * m0 + grid * m1, keep * v0 + grid**2 * v1
    steps = mean.diff(dim=0).square() / variance[1:] + 0.5 * variance.log().diff(dim=0).square()
    length = steps.sum(-1).sqrt().cumsum(0)
    if not length[-1].isfinite():
        raise ValueError(
            "TelescopingNCE spaces its waymarks by means and variances of data and noise in the "
            "first batch, which are not finite: look for NaN in the data, or give waymarks="
        )
    wanted = torch.arange(1, num_steps, dtype=length.dtype, device=length.device) / num_steps
    inner = grid[1:, 0][torch.searchsorted(length, wanted * length[-1])]
    return torch.cat([inner, inner.new_ones(1)])
