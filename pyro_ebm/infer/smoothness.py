r"""Whether the slope of an energy moves by jumps, as that of a network of ReLUs does.

Where the slope jumps the second derivative is a Dirac mass that no automatic derivative shows:
losses with second derivatives see the flat pieces only, and losses with first ones do not see the
jumps move with the parameters. Between two points a and b a smooth energy has

.. math:: \nabla U(b) - \nabla U(a) = \int_0^1 \nabla^2 U(a + t (b - a))\,(b - a)\, dt .

If the integrand is the same at both ends and in the middle, and still is not the change of the
slope, there are jumps between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.infer.unconstrained import Unconstrained

__all__ = ["has_jumps", "refuse_jumps"]


@torch.no_grad()
def refuse_jumps(name: str, space: Unconstrained, x: Tensor, why: str) -> None:
    """Looks for jumps between the data and their mirror images.

    Args:
        name: The site.
        space: Its coordinates.
        x: Its data.
        why: What is wrong with jumps, ``{who}`` standing for the objective.

    Raises:
        ValueError: If the slope of the energy moves by jumps.
    """
    if has_jumps(space, space.coordinates(space.p.broadcast_value(x))):
        raise ValueError(
            f"EBM site {name!r}: the energy's slope jumps between pieces on which its second "
            f"derivative is constant, as that of a ReLU network does, and "
            f"{why.format(who=space.who)}: use smooth activations (SiLU, softplus, tanh) or NCE"
        )


def has_jumps(space: Unconstrained, u: Tensor) -> bool:
    """Whether the slope changes by more than a second derivative that is the same everywhere.

    For a quadratic the two agree, for a smooth energy the second derivative varies.
    """
    end = -u - 0.5
    along = end - u
    middle = torch.func.vjp(space.score, 0.5 * (u + end))[1](along)[0]
    (start, first), (other, last) = (_pulled(space, at, along) for at in (u, end))
    size = along.abs().amax() * torch.finfo(u.dtype).eps ** 0.5
    scale = size * (1 + torch.stack([first, middle, last, start, other]).abs().amax())
    is_constant = torch.stack([first - middle, last - middle]).abs().amax() <= scale
    return bool(is_constant & ((other - start - middle).abs().amax() > scale))


def _pulled(space: Unconstrained, u: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """The score, and its derivative along a direction: Hessians are symmetric."""
    score, pull_back = torch.func.vjp(space.score, u)[:2]
    return score, pull_back(along)[0]
