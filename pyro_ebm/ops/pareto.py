r"""The tail index of importance weights, and what it says of their variance.

The largest weights are fitted by a generalized Pareto law; its shape k says how many moments the
weights have: the variance exists for k < 1/2, and up to k of about .7 the smoothed estimate still
converges at a practical rate.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry, Pareto smoothed importance sampling, JMLR 25(72), 2024;
    Zhang, Stephens, A new and efficient estimation method for the generalized Pareto distribution,
    Technometrics 51, 2009 (the fit).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["pareto_khat"]

_LEAST_TAIL = 5


def pareto_khat(log_weights: Tensor) -> float:
    """Returns the Pareto tail index of weights, minus infinity where the tail has no spread.

    Args:
        log_weights: Log weights ``(S,)``, up to a constant.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> u = torch.rand(20_000, dtype=torch.float64)
        >>> round(pareto_khat(-0.5 * u.log()), 1)  # weights u^(-k)
        0.5
    """
    log_weights = log_weights.double()
    num = len(log_weights)
    size = math.ceil(min(0.2 * num, 3.0 * math.sqrt(num)))
    if size < _LEAST_TAIL:
        return math.inf
    ordered = (log_weights - log_weights.max()).sort().values
    tail = torch.exp(ordered[-size:]) - torch.exp(ordered[-size - 1])
    if not float(tail[-1]) > 0:
        return -math.inf
    return _shape_of(tail)


def _shape_of(excess: Tensor) -> float:
    """The shape of a generalized Pareto law, a posterior mean over a grid, with a weak prior."""
    n, prior_weight = len(excess), 10
    num_grid = 30 + int(math.sqrt(n))
    grid = torch.arange(1, num_grid + 1, dtype=excess.dtype, device=excess.device)
    quartile = excess[int(n / 4 + 0.5) - 1]
    theta = 1.0 / excess[-1] + (1.0 - torch.sqrt(num_grid / (grid - 0.5))) / (3.0 * quartile)
    k = torch.log1p(-theta[:, None] * excess).mean(1)
    profile = n * (torch.log(-theta / k) - k - 1.0)
    mean = (profile.softmax(0) * theta).sum()
    shape = float(torch.log1p(-mean * excess).mean())
    return (n * shape + prior_weight * 0.5) / (n + prior_weight)
