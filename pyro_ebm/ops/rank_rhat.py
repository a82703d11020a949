r"""Rank-normalized split R-hat in torch, for warnings and progress bars.

Every chain is cut in two halves, draws are replaced by the normal scores of their pooled ranks
:math:`z = \Phi^{-1}((r - 3/8) / (S + 1/4))`, and

.. math:: \hat R = \sqrt{\frac{(n - 1) W + B}{n W}}

compares the variance between the half chains, :math:`B`, with the one within, :math:`W`. The
larger of the values for the draws (location) and for their distance to the median (scale) is
reported. Reports to users go through ArviZ; this agrees with it.

References:
    Vehtari, Gelman, Simpson, Carpenter, Buerkner, Rank-normalization, folding, and localization: an
    improved R-hat, Bayesian Analysis 16(2), 2021. arXiv:1903.08008.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rank_rhat", "worst_rhat"]


def rank_rhat(draws: Tensor) -> Tensor:
    r"""Returns the rank-normalized split R-hat of every quantity.

    Args:
        draws: Draws of shape ``(draws, chains, ...)`` with at least four draws per chain.

    Returns:
        A float64 tensor of the trailing shape ``(...)``; ``nan`` for quantities that never vary.

    Raises:
        ValueError: If there are fewer than four draws per chain.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> bool((rank_rhat(torch.randn(500, 4, 3)) < 1.01).all())
        True
    """
    if draws.shape[0] < 4:
        raise ValueError(f"R-hat needs at least 4 draws per chain, got {draws.shape[0]}")
    halves = _split(draws.detach().double())
    bulk = _rhat(_normal_scores(halves))
    folded = _rhat(_normal_scores((halves - _median(halves)).abs()))
    # Two equally frequent values lie equally far from their median: nothing is left to fold.
    return torch.fmax(bulk, folded)


def worst_rhat(draws: Tensor) -> float:
    """Returns the largest rank-normalized R-hat of all quantities.

    One where nothing ever varies, which has nothing to disagree on; infinite where it is unknown.

    Args:
        draws: As of :func:`rank_rhat`.

    Example:
        >>> worst_rhat(torch.ones(10, 4, 2))
        1.0
    """
    constant = (draws == draws[:1, :1]).all(0).all(0)
    if bool(constant.all()):
        return 1.0
    rhat = torch.where(constant, 1.0, rank_rhat(draws))
    return float(rhat.nan_to_num(nan=torch.inf).max())


def _split(draws: Tensor) -> Tensor:
    """Moves quantities to the front and halves the chains: ``(..., 2 * chains, draws // 2)``."""
    half = draws.shape[0] // 2
    return torch.cat([draws[:half], draws[-half:]], 1).movedim((1, 0), (-2, -1))


def _median(halves: Tensor) -> Tensor:
    ordered = halves.flatten(-2).sort(-1).values
    size = ordered.shape[-1]
    return (0.5 * (ordered[..., (size - 1) // 2] + ordered[..., size // 2]))[..., None, None]


def _normal_scores(halves: Tensor) -> Tensor:
    """Normal scores of the pooled ranks; tied values share their mean rank."""
    values = halves.flatten(-2).contiguous()
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    rank = 0.5 * (below + up_to + 1).double()
    return torch.special.ndtri((rank - 0.375) / (values.shape[-1] + 0.25)).view_as(halves)


def _rhat(scores: Tensor) -> Tensor:
    size = scores.shape[-1]
    within = scores.var(-1).mean(-1)
    between = size * scores.mean(-1).var(-1)
    return ((between / within + size - 1) / size).sqrt()
