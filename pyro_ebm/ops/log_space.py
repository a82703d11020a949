r"""Weights, means and normalizer equations in log space."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEGLIGIBLE = 36.0
"""Nats below the largest term from which others do not count: a double rounds exp(-36) away."""


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    """Returns the log of the mean of ``exp(values)`` along ``dim``.

    Example:
        >>> log_mean_exp(torch.full((5,), 1000.0))
        tensor(1000.)
    """
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Returns :math:`(\sum w)^2 / \sum w^2` of log weights along ``dim``.

    Example:
        >>> effective_sample_size(torch.zeros(8))
        tensor(8.)
    """
    return torch.exp(2 * torch.logsumexp(log_weights, dim) - torch.logsumexp(2 * log_weights, dim))


def draw_by_weight(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Draws indices along ``dim`` with weights ``exp(log_weights)``, by exponential races.

    Example:
        >>> draw_by_weight(torch.tensor([-torch.inf, 3.0, -torch.inf]))
        tensor(1)
    """
    return (log_weights - torch.empty_like(log_weights).exponential_().log()).argmax(dim)


def bennett(data: Tensor, noise: Tensor, *, ratio: float, num_steps: int = 60) -> Tensor:
    r"""Returns the root c of :math:`E_d\,\sigma(c - s) = \nu E_q\,\sigma(s - c)`, by bisection.

    Args:
        data: Log ratios :math:`s` of the data, flat: :math:`-U - \log q - \log\nu`.
        noise: The same at noise draws, flat; minus infinity where the law vanishes.
        ratio: :math:`\nu`.
        num_steps: Halvings of the bracket.

    Returns:
        The Bennett acceptance ratio estimate of log Z in nats, 0-d.
    """
    both = torch.cat([data, noise])
    known = torch.isfinite(both)
    low = torch.where(known, both, torch.inf).min() - 40.0
    high = torch.where(known, both, -torch.inf).max() + 40.0
    for _ in range(num_steps):
        middle = (low + high) / 2
        excess = torch.sigmoid(middle - data).mean() - ratio * torch.sigmoid(noise - middle).mean()
        low, high = torch.where(excess < 0, middle, low), torch.where(excess < 0, high, middle)
    return (low + high) / 2
