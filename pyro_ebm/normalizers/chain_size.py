r"""How many independent draws the draws of chains are worth for their mean.

Autocorrelations within a chain need some length to be seen: for fewer than :data:`MIN_LENGTH`
draws of each their sum is biased, below four even meaningless. Short chains are therefore compared
with each other,

.. math:: S = C\, \frac{\text{variance of all draws}}{\text{variance of the chains' means}} .

What chains never enter is in no such number: see :mod:`~pyro_ebm.normalizers.chain_remarks`.
"""

from __future__ import annotations

from pyro.ops.stats import effective_sample_size
from torch import Tensor

MIN_LENGTH = 20
"""Draws of a chain below which its autocorrelations say nothing."""

MIN_CHAINS = 20
"""Chains below which neither their spread nor resampling them is a measure of an error."""


def effective_size(draws: Tensor) -> float:
    """Returns the effective number of draws, at least 1 and at most their number.

    Args:
        draws: One quantity, ``(chains, draws)``.

    Returns:
        A number; NaN where all draws are the same.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> independent = torch.randn(100, 5)
        >>> 350 < effective_size(independent) <= 500
        True
        >>> 70 < effective_size(independent[:, :1].expand(-1, 5)) < 130
        True
    """
    num_chains, length = draws.shape
    total = draws.double().var()
    if not float(total) > 0.0:
        return float("nan")
    if length == 1:
        return float(num_chains)
    if length >= MIN_LENGTH or num_chains == 1:
        size = float(effective_sample_size(draws.double(), chain_dim=0, sample_dim=1))
    else:
        size = num_chains * float(total / draws.double().mean(1).var())
    return min(max(size, 1.0), float(draws.numel()))


def size_of_mean(terms: Tensor) -> float:
    """Returns the effective number of ``(chains, draws)`` for their mean; all, where they agree."""
    size = effective_size(terms)
    return size if size == size else float(terms.numel())


def carried_share(terms: Tensor) -> float:
    """Returns what part of nonnegative terms carries their mean, from 0 to 1."""
    return float(terms.mean().square() / terms.square().mean())
