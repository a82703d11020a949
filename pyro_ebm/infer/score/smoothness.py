r"""Whether the slope of an energy moves by jumps, as that of a network of ReLUs does.

Where the slope jumps the second derivative is a Dirac mass that no automatic derivative shows:
losses with second derivatives see the pieces only, and losses with first ones do not see the jumps
move with the parameters. On the way from one row of the data to another, :math:`g(t) = U(a + t (b -
a))`, a smooth energy has

.. math:: g'(t + h) - g'(t) = \int_t^{t+h} g''(r)\, dr .

What the midpoint rule leaves of it is bisected, on every way towards the half where more is left.
Of a smooth energy that comes to nothing as h shrinks, of a slope like :math:`\sqrt t` too, and a
jump stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.known_normalizer import parameters_of_modules
from pyro_ebm.infer.scoring.unconstrained import Unconstrained, check_interior
from pyro_ebm.ops.module_calls import buffers_restored

__all__ = ["has_jumps", "refuse_jumps"]

MIN_SHARE = 1e-3  # of the ways: fewer pass so near to a point where only the direction changes
ASIDE = 0.1  # standard deviations between a row and where its way begins
PERSISTENT = 0.25  # of what was left since halfway through the bisection


@torch.no_grad()
def refuse_jumps(name: str, space: Unconstrained, x: Tensor, why: str) -> None:
    """Looks for jumps between the data.

    Args:
        name: The site.
        space: Its coordinates.
        x: Its data.
        why: What is wrong with jumps, ``{who}`` standing for the objective.

    Raises:
        ValueError: If the slope of the energy moves by jumps, be it by rounding, or data lie on the
            support's border.
    """
    x = space.p.broadcast_value(x)
    check_interior(name, space.p, x, space.who)
    u = space.coordinates(x)
    with torch.autocast(u.device.type, enabled=False):  # whose rounding is jumps, too
        if not has_jumps(space, u):
            return
    coarse = _coarser_dtype(space.p, u)
    if coarse is not None:
        raise ValueError(
            f"EBM site {name!r}: the energy has weights of {coarse} at data of {u.dtype}, whose "
            f"rounding cannot be told from jumps of its slope, and {space.who} differentiates that "
            f"slope: call network.to({u.dtype}), or use NCE"
        )
    raise ValueError(
        f"EBM site {name!r}: the energy's slope jumps at kinks, as that of a ReLU network or "
        f"of absolute values does, and {why.format(who=space.who)}: use smooth activations "
        "(SiLU, softplus, tanh) or NCE"
    )


def _coarser_dtype(p: EnergyDistribution, x: Tensor) -> torch.dtype | None:
    """A floating dtype of the energy's weights that rounds more than that of ``x``, if any."""
    dtypes = {t.dtype for t in parameters_of_modules(p) if t.is_floating_point()}
    eps = torch.finfo(x.dtype).eps
    return next((dtype for dtype in dtypes if torch.finfo(dtype).eps > eps), None)


def has_jumps(space: Unconstrained, u: Tensor) -> bool:
    """Whether the slope jumps on the ways between rows of ``u``, ``rows + event``.

    Of a random energy, as under dropout, nothing can be said. One whose modules keep a state, such
    as the vectors of spectral norms, is looked at in the state that it is in now.
    """
    start, along = _ways(u, space)
    score = buffers_restored()(space.score)

    @buffers_restored()
    def slope(t: Tensor) -> tuple[Tensor, Tensor]:
        """The first two derivatives on every way in nats, of opposite sign, ``rows``."""
        at = start + t.reshape(t.shape + (1,) * space.event_dim) * along
        here, second = space.score_and_curvatures(at, along.unsqueeze(0))
        return space.event_sum(here * along), second[0]

    found = _bisected(slope, u.new_zeros(space.rows(u)))
    bends = float(found.double().mean()) > MIN_SHARE
    return bends and torch.allclose(score(u), score(u))


class _Stretch(NamedTuple):
    """The part of every way that is looked at: where it begins, and slopes there, ``rows``."""

    start: Tensor
    at_start: Tensor
    at_middle: Tensor
    at_end: Tensor


def _bisected(slope: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """Returns on which ways a change of the slope stays however short the stretch becomes."""
    ends = [slope(start + t)[0] for t in (0.0, 0.5, 1.0)]
    eps = torch.finfo(start.dtype).eps
    tolerance = eps**0.5 * (1 + torch.stack(ends).abs().amax(0))
    stretch, left = _Stretch(start, *ends), []
    for k in range(round(-math.log2(eps)) - 3):  # points stay apart
        stretch, now = _half(slope, stretch, 0.5**k)
        left.append(now)
        if not bool((now > tolerance).any()):
            return torch.zeros_like(now, dtype=torch.bool)
    last = torch.stack(left[len(left) // 2 :])
    return (last.amin(0) > tolerance) & (last.amin(0) > PERSISTENT * last.amax(0))


def _half(
    slope: Callable[[Tensor], tuple[Tensor, Tensor]], stretch: _Stretch, width: float
) -> tuple[_Stretch, Tensor]:
    """Returns the half of which the midpoint rule explains less, and how much it leaves, >= 0."""
    start, at_start, at_middle, at_end = stretch
    (first, second), (third, fourth) = (slope(start + q * width) for q in (0.25, 0.75))
    left = (at_middle - at_start - 0.5 * width * second).abs()
    right = (at_end - at_middle - 0.5 * width * fourth).abs()
    goes_left = left >= right
    begin = _Stretch(start, at_start, first, at_middle)
    end = _Stretch(start + 0.5 * width, at_middle, third, at_end)
    half = (torch.where(goes_left, a, b) for a, b in zip(begin, end, strict=True))
    return _Stretch(*half), torch.maximum(left, right)


def _ways(u: Tensor, space: Unconstrained) -> tuple[Tensor, Tensor]:
    """Returns where ways begin, near a row each, and how they lead to where another begins.

    Drawn alike each time: rows may be mirror images or copies of each other, in any order, and
    ways between mirror images would all meet at one point. A single row leads to its mirror image.
    """
    num_rows = space.rows(u).numel()
    if num_rows < 2:
        return u, -2 * u - 0.5
    rows = u.flatten(0, -1 - space.event_dim)
    alike = torch.Generator().manual_seed(0)
    order = torch.randperm(num_rows, generator=alike).to(u.device)
    aside = torch.randn(rows.shape, generator=alike, dtype=torch.float64).to(u)
    start = rows + ASIDE * rows.std(0) * aside
    other = torch.empty_like(start)
    other[order] = start[order.roll(1)]
    return start.reshape(u.shape), (other - start).reshape(u.shape)
