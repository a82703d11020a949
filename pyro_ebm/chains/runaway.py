r"""Noticing chains that run away: how :math:`\int e^{-U} = \infty` looks to a sampler.

A sampler cannot prove that a density is improper, and it need not fail: on a flat potential NUTS
accepts every step, doubles its step size until numbers end, and reports no divergence. What can be
seen is the motion. A site is said to run away if one of these holds:

* *not finite*: some draw is NaN or infinite;
* *huge*: draws spread over more than ``1e6`` (median distance to the median, in the site's own
  units) while the chains disagree (split R-hat above 1.2). The first alone may be the scale of the
  data, the second alone a slow chain;
* *outward*: in most chains at least 95 % of the moves of some coordinate (40 or more) increase
  :math:`|x|`, the last quarter lies 10 % further out than the first, and the way between the last
  two quarters is at least 0.4 of that between the first two. Around a proper mode inward and
  outward moves balance, however strong the autocorrelation, and a chain on its way to a distant
  mode slows down.

Each of them is rare in draws from a proper density; heavy but integrable tails and slow mixing do
not set them off. Improper directions that a chain has not yet found are not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["find_runaways"]

HUGE = 1e6
DISAGREEMENT = 1.2
OUTWARD_SHARE = 0.95
OUTWARD_MOVES = 40
OUTWARD_GROWTH = 1.1
NOT_SLOWING = 0.4

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def find_runaways(draws: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Returns the sites that run away and how: ``{"x": "moves outward ..."}``, empty if none does.

    Args:
        draws: Arrays of shape ``(chains, draws, ...)``; only floating-point sites are looked at.

    Example:
        >>> import numpy as np
        >>> walk = np.exp(0.05 * np.arange(200.0)) * np.ones((4, 1))
        >>> sorted(find_runaways({"x": walk, "y": np.random.default_rng(0).normal(size=(4, 200))}))
        ['x']
    """
    found = {name: _why(x) for name, x in draws.items() if np.issubdtype(x.dtype, np.floating)}
    return {name: why for name, why in found.items() if why}


def _why(draws: NDArray[Any]) -> str:
    x = draws.reshape(*draws.shape[:2], -1).astype(np.float64)
    if not np.isfinite(x).all():
        return f"{np.mean(~np.isfinite(x)):.0%} of its values are not finite"
    if x.shape[1] < 4:
        return ""
    if (huge := _is_huge(x)).any():
        return f"spreads over {_spread(x)[huge].max():.1e} and its chains disagree"
    if _moves_outward(x):
        return f"moves outward at nearly every step, to {np.abs(x).max():.3g} so far"
    return ""


def _spread(x: Floats) -> Floats:
    scale = _scale(x)
    x = x / scale
    centre = np.median(x, axis=(0, 1))
    spread: Floats = scale * np.median(np.abs(x - centre), axis=(0, 1))
    return spread


def _scale(x: Floats) -> Floats:
    """The largest number of each coordinate: sums of two of them may have no number."""
    scale: Floats = np.maximum(np.abs(x).max(axis=(0, 1)), 1.0)
    return scale


def _is_huge(x: Floats) -> Flags:
    """Per coordinate of ``(chains, draws, D)``."""
    huge = _spread(x) > HUGE
    if huge.any():
        huge[huge] = _split_rhat(x[..., huge]) > DISAGREEMENT
    return huge


def _split_rhat(x: Floats) -> Floats:
    """Plain split R-hat; infinite for chains that stand still."""
    half = x.shape[1] // 2
    halves = np.concatenate([x[:, :half], x[:, -half:]]) / np.abs(x).max(axis=(0, 1))
    within = halves.var(axis=1, ddof=1).mean(axis=0)
    between = halves.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(divide="ignore"):
        return np.sqrt(1.0 - 1.0 / half + between / within)


def _moves_outward(x: Floats) -> bool:
    """Whether most chains of ``(chains, draws, D)`` hardly ever turn back in some direction."""
    distance = np.abs(x) / _scale(x)
    step = np.diff(distance, axis=1)
    moves, outward = (step != 0).sum(axis=1), (step > 0).sum(axis=1)
    quarters = np.stack([np.median(q, axis=1) for q in np.array_split(distance, 4, axis=1)])
    way = np.diff(quarters, axis=0)
    steady = (moves >= OUTWARD_MOVES) & (outward >= OUTWARD_SHARE * moves)
    further = (quarters[3] > OUTWARD_GROWTH * quarters[0]) & (way[2] > NOT_SLOWING * way[0])
    return bool((steady & further).any(axis=-1).mean() > 0.5)
