r"""Potentials on the unconstrained coordinates of a continuous support, with their derivatives.

:math:`x = T(u)` and :math:`\tilde U(u) = U(T(u)) - \log|\det J_T(u)|`, so that losses made of
scores need no conditions at the support's boundary. Derivatives in u are taken by ``torch.func``:
they can be differentiated further with respect to parameters, and followed by ``vmap`` and captured
graphs.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.ops.graph_recording import is_recording, require
from pyro_ebm.ops.spaces import bijection, has_ends, is_at_end

__all__ = ["Unconstrained", "check_interior"]

MAX_NUMBERS = 2**24  # second derivatives in one pass: 128 MiB of doubles


def check_interior(name: str, p: EnergyDistribution, x: Tensor, who: str) -> None:
    """Raises if data lie on the border of a closed support, where coordinates are infinite.

    Of a graph that is recorded it is a condition.

    Args:
        name: The site.
        p: Its EBM.
        x: Its data, ``rows + event``; rows that do not count have been replaced.
        who: The objective.

    Raises:
        ValueError: If some do.
    """
    if not has_ends(p.support):
        return
    at_end = is_at_end(p.support, x, len(p.event_shape))
    if is_recording():
        require(~at_end.any())
    elif at_end.any():
        rows = at_end.reshape((*rows_of(p, x), -1)).any(-1)
        raise ValueError(
            f"EBM site {name!r}: {int(rows.sum())} of {rows.numel()} rows of the data lie on "
            f"the border of the support {p.support}, and {who} takes its unconstrained coordinates,"
            " which are infinite there: move these rows inside, leave them out, or use NCE"
        )


class Unconstrained:
    """An EBM's potential as a function of unconstrained coordinates.

    Args:
        p: The EBM, on a continuous support.
        who: What messages call the loss.

    Raises:
        NotImplementedError: If the support is not continuous, or has no bijection from the reals.

    Example:
        >>> p = EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(3,))
        >>> Unconstrained(p, "A loss").score_and_trace(torch.ones(2, 3))
        (tensor([[-2., -2., -2.],
                [-2., -2., -2.]]), tensor([-6., -6.]))
    """

    def __init__(self, p: EnergyDistribution, who: str) -> None:
        if p.base_measure != "lebesgue":
            raise NotImplementedError(
                f"{who} differentiates the energy in x, so it needs a continuous support, got "
                f"{p.support} (measure {p.base_measure!r}); use PseudoLikelihood or DiscreteFisher "
                "on discrete supports, on spheres NCE with noise=, and on tables with columns of "
                "both kinds DiscreteEnergyDiscrepancy(MixedColumns(...)) or NCE"
            )
        self.p = p
        self.who = who
        self.transform: Transform = bijection(p.support, len(p.event_shape))
        self.event_dim = self.transform.domain.event_dim

    def coordinates(self, x: Tensor) -> Tensor:
        """Returns u for ``x``, ``rows + event``; events of the simplex lose a coordinate.

        Raises:
            ValueError: If ``x`` holds integers.
        """
        if not x.is_floating_point():
            raise ValueError(
                f"{self.who} differentiates the energy in x, so x must be floating point, got "
                f"{x.dtype}: call x.double() if the data are measurements, or give the "
                "distribution a discrete support and use PseudoLikelihood if they are counts or "
                "categories"
            )
        u: Tensor = self.transform.inv(x)
        return u

    def potential(self, u: Tensor) -> Tensor:
        """Returns the potential in nats, ``rows``."""
        x = self.transform(u)
        return self.p.potential(x) - self.transform.log_abs_det_jacobian(u, x)

    def score(self, u: Tensor) -> Tensor:
        """Returns minus the gradient of the potential in u, shaped as ``u``."""
        return -torch.func.grad(lambda at: self.potential(at).sum())(u)

    def score_and_trace(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the score and the trace of its Jacobian, minus the Laplacian, ``rows``."""
        event = u.shape[u.dim() - self.event_dim :]
        units = torch.eye(prod(event), dtype=u.dtype, device=u.device)
        units = units.reshape((-1,) + (1,) * (u.dim() - len(event)) + tuple(event))
        score, second = self.score_and_curvatures(u, units)
        return score, second.sum(0)

    def score_and_curvatures(self, u: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the score :math:`s` and :math:`v' \nabla s\, v` along every direction v.

        Each direction costs one backward pass, and all of them share the forward pass.

        Args:
            u: Coordinates, ``rows + event``.
            directions: Shape ``(M,) + rows + event``, or one that broadcasts to it.

        Returns:
            The score, shaped as ``u``, and the second derivatives, ``(M,) + rows``.
        """
        score, pull_back = torch.func.vjp(self.score, u)[:2]

        def second(direction: Tensor) -> Tensor:
            along = direction.expand(u.shape)
            return self.event_sum(pull_back(along)[0] * along)

        if len(directions) == 1:  # vmap over one costs as much as a backward pass
            return score, second(directions[0]).unsqueeze(0)
        size = max(1, MAX_NUMBERS // max(1, u.numel()))
        return score, torch.vmap(second, chunk_size=size)(directions)

    def rows(self, u: Tensor) -> torch.Size:
        """Returns the shape of the rows of ``u``, ``rows + event``."""
        return u.shape[: u.dim() - self.event_dim]

    def event_sum(self, values: Tensor) -> Tensor:
        """Returns the sum over an event's coordinates, ``rows``, of ``rows + event``."""
        return values.sum(tuple(range(-self.event_dim, 0))) if self.event_dim else values
