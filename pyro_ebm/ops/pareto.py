r"""The tail index of importance weights, and what it says of their mean.

The largest weights are fitted by a generalized Pareto law; its shape k says how many moments the
weights have: the variance exists for k < 1/2, and up to k of about .7 the smoothed estimate still
converges at a practical rate.

An error of the mean from the variance of what was drawn is too small long before k = 1/2: what
makes the variance has seldom been drawn, and where it has not the mean is low as well. Here the
share p of the weights above a threshold u counts as its fit, of mean :math:`u + \sigma / (1 - k)`
and, by the covariance of k and :math:`\sigma`, of variance

.. math:: \frac{(1 + k)\, \sigma^2}{m} \Big\{\frac{1 + k}{(1 - k)^4} - \frac{2}{(1 - k)^3} +
    \frac{2}{(1 - k)^2}\Big\}

for m weights, finite up to k = 1. As errors are believed only where the estimate of k is below .7,
those that are have one that came out low: k is raised, by nothing up to .3 and by two of its own
standard errors at .7, but not beyond .75.

Weights of discrete laws are tied. What is tied with the largest weight of the body belongs to the
body, or where that leaves hardly a tail, to the tail. The threshold then lies halfway between them,
as each value stands for those around it.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry, Pareto smoothed importance sampling, JMLR 25(72), 2024;
    Johansson, Estimating the mean of heavy-tailed distributions, Extremes 6, 2003 (the error);
    Zhang, Stephens, A new and efficient estimation method for the generalized Pareto distribution,
    Technometrics 51, 2009 (the fit).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ParetoTail", "pareto_khat", "pareto_tail"]

_MIN_TAIL = 5
_MIN_FITTED = 40  # of 200 weights; of fewer the fit is mostly its prior
_PRIOR = 10  # weights that the prior of the shape, at 1/2, is worth
_HARMLESS, _HARMFUL = 0.3, 0.7  # between them k is raised by up to _RAISED standard errors
_RAISED = 2.0
_MAX_SHAPE = 0.75  # up to which k is raised: beyond, errors grow without covering more


class ParetoTail(NamedTuple):
    """What the largest weights say.

    Args:
        khat: Their tail index.
        error: The standard error of the mean weight by it, relative to the mean; zero where the
            tail is bounded, or of too few weights for a fit.
    """

    khat: float
    error: float


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
    return pareto_tail(log_weights).khat


def pareto_tail(log_weights: Tensor) -> ParetoTail:
    """Returns the tail index of weights, and the error of their mean that it makes.

    Args:
        log_weights: Log weights ``(S,)``, up to a constant.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> tail = pareto_tail(torch.randn(10_000, dtype=torch.float64))
        >>> plain = (math.expm1(1.0) / 10_000) ** 0.5  # of lognormal weights
        >>> 0.9 < tail.error / plain < 1.2
        True
    """
    log_weights = log_weights.double()
    num = len(log_weights)
    size = math.ceil(min(0.2 * num, 3.0 * math.sqrt(num)))
    if size < _MIN_TAIL:
        return ParetoTail(math.inf, 0.0)
    weights = (log_weights - log_weights.max()).sort().values.exp()
    body, tail = _parted(weights, size)
    if len(tail) == 0 or bool(tail[0] == tail[-1] and len(tail) >= _MIN_TAIL):
        return ParetoTail(-math.inf, 0.0)
    if len(tail) < _MIN_TAIL:
        return ParetoTail(math.inf, 0.0)
    is_tied = bool((body[-2:] == body[-1]).all()) and len(body) > 1
    threshold = 0.5 * (body[-1] + tail[0]) if is_tied else body[-1]
    khat, scale = _shape_of(tail - threshold)
    if khat <= 0 or len(tail) < _MIN_FITTED:
        return ParetoTail(khat, 0.0)
    mean = float(threshold) + scale / (1.0 - min(khat, _MAX_SHAPE))
    return ParetoTail(khat, _error(body, len(tail), khat, scale, mean) / float(weights.mean()))


def _parted(weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Ordered weights up to a threshold, and those above it: about the ``size`` largest."""
    threshold = weights[-size - 1]
    is_body = weights <= threshold
    if 0 < int((~is_body).sum()) < _MIN_TAIL and bool(weights[0] < threshold):
        is_body = weights < threshold
    return weights[is_body], weights[~is_body]


def _error(body: Tensor, size: int, khat: float, scale: float, mean: float) -> float:
    """The standard error of a mean of which the tail counts as its fit, of this ``mean``."""
    num = len(body) + size
    share, k = size / num, min(khat, _MAX_SHAPE)
    spread = (1.0 - share) * float(body.var()) + share * (1.0 - share) * (
        mean - float(body.mean())
    ) ** 2
    more = _RAISED * min(max(k - _HARMLESS, 0.0) / (_HARMFUL - _HARMLESS), 1.0)
    k = min(k + more * (1.0 + k) / math.sqrt(size + _PRIOR), _MAX_SHAPE)
    rest = 1.0 - k
    of_tail = (1.0 + k) / rest**4 - 2.0 / rest**3 + 2.0 / rest**2
    return math.sqrt(spread / num + share**2 * (1.0 + k) * scale**2 * of_tail / size)


def _shape_of(excess: Tensor) -> tuple[float, float]:
    """Shape and scale of a generalized Pareto law, posterior means, the shape with a weak prior."""
    n = len(excess)
    num_grid = 30 + int(math.sqrt(n))
    grid = torch.arange(1, num_grid + 1, dtype=excess.dtype, device=excess.device)
    quartile = excess[int(n / 4 + 0.5) - 1]
    theta = 1.0 / excess[-1] + (1.0 - torch.sqrt(num_grid / (grid - 0.5))) / (3.0 * quartile)
    k = torch.log1p(-theta[:, None] * excess).mean(1)
    ratio = torch.where(k == 0, 1.0 / excess.mean(), -theta / k)  # its limit, where theta is zero
    profile = n * (torch.log(ratio) - k - 1.0)
    mean = (profile.softmax(0) * theta).sum()
    shape = float(torch.log1p(-mean * excess).mean())
    return (n * shape + _PRIOR * 0.5) / (n + _PRIOR), -shape / float(mean)
