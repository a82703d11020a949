r"""Score matching: the Fisher divergence between data and model, without the data's density.

.. math:: \ell(x) = \tfrac12 |s(x)|^2 + \operatorname{tr} \nabla s(x)
    = \tfrac12 |\nabla U(x)|^2 - \Delta U(x), \qquad s = -\nabla U,

is :math:`\tfrac12 E|s - s_{data}|^2` up to a constant after an integration by parts. The trace is
exact and costs as many backward passes as an event has coordinates. On a constrained support all of
it is meant in the unconstrained coordinates, where U includes the Jacobian.

It needs two derivatives in x: for a network of ReLUs, whose slope jumps and whose second derivative
is zero, the integration by parts is wrong, which is refused. It is blind to the weights of
separated modes.

References:
    Hyvärinen, Estimation of non-normalized statistical models by score matching, JMLR 6, 2005.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.deterministic import DeterministicObjective
from pyro_ebm.infer.unconstrained import Unconstrained


class ScoreMatching(DeterministicObjective):
    """Score matching with the exact trace; it draws nothing.

    Args:
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: On a support that is not continuous.
        ValueError: If the energy's slope jumps, as that of a network of ReLUs does.

    Example:
        >>> p = EnergyDistribution(lambda x: 0.5 * (x**2).sum(-1), event_shape=(3,))
        >>> ScoreMatching().loss(p, torch.ones(3))  # 3/2 - 3
        tensor(-1.5000)
    """

    def loss(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns half the squared score plus the trace of its Jacobian, in squared score units."""
        space = Unconstrained(p, "ScoreMatching")
        score, trace = space.score_and_trace(space.coordinates(p.broadcast_value(x)))
        squared = score.square()
        dims = tuple(range(-space.event_dim, 0))
        return 0.5 * (squared.sum(dims) if dims else squared) + trace

    def check(self, name: str, p: EnergyDistribution, x: Tensor) -> None:
        """Raises ``ValueError`` if the slope of the energy moves by jumps."""
        space = Unconstrained(p, "ScoreMatching")
        u = space.coordinates(p.broadcast_value(x))
        if has_jumps(space, u):
            raise ValueError(
                f"EBM site {name!r}: the energy's slope jumps between pieces on which its second "
                "derivative is constant, as that of a ReLU network does, and ScoreMatching sees "
                "the pieces only: use smooth activations (SiLU, softplus, tanh) or NCE"
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
