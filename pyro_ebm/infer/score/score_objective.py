r"""The part that is common to objectives made of an energy's derivatives in x.

Derivatives are taken in the unconstrained coordinates of a continuous support, where U includes the
Jacobian. Whatever is drawn beside the data, probes or noise, has a law of the objective's own, so
that a guide cannot hold it; log Z has no derivative, so that conditional energies are welcome.

Traces of :math:`\nabla s`, :math:`s = -\nabla U`, are estimated along directions v with
:math:`E\,vv' = I` as the mean of :math:`v' \nabla s\, v`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.score.smoothness import refuse_jumps
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.second_derivatives import remedies_named
from pyro_ebm.infer.scoring.unconstrained import Unconstrained, check_interior

__all__ = ["Probes", "ScoreObjective", "probed_loss", "signs"]

MIN_WHOLE = 32  # whole numbers that come about by no rounding of a few


class Probes(NamedTuple):
    """Directions along which second derivatives are taken.

    Args:
        directions: Shape ``(M,) + rows + event`` in unconstrained coordinates.
    """

    directions: Tensor


class ScoreObjective(Objective):
    """Base of objectives that differentiate the energy in x; a subclass defines ``draw_at``.

    Attributes:
        why_smooth: What is wrong with an energy whose slope jumps, ``{who}`` standing for the
            objective; ``None`` where nothing is.
    """

    why_smooth: str | None = "{who} sees the pieces only"

    def space(self, p: EnergyDistribution) -> Unconstrained:
        """Returns the coordinates in which derivatives are taken.

        Raises:
            NotImplementedError: On a support that is not continuous.
        """
        return Unconstrained(p, type(self).__name__)

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Any:
        """Draws by the objective's own law what goes with the data.

        Raises:
            ValueError: If a guide holds a contrast, or data lie on the support's border.
        """
        if noise is not None:
            raise ValueError(
                f"{type(self).__name__} draws what it needs by a law of its own, but the guide "
                f"holds {type(noise).__name__} as the site's contrast: take the site out of the "
                "guide"
            )
        space = self.space(p)
        check_interior(self.evaluation.site, p, x, space.who)
        return self.draw_at(space, space.coordinates(x))

    @abstractmethod
    def draw_at(self, space: Unconstrained, u: Tensor) -> Any:
        """Draws what goes with data of coordinates ``u``, ``rows + event``."""

    def check_unconditional(
        self, name: str, p: EnergyDistribution, x: Tensor, known: Tensor | None
    ) -> None:
        """Raises ``ValueError`` if the slope of the energy moves by jumps and must not.

        Conditional energies are welcome. Warns of whole numbers, which have no density, where the
        loss is made of slopes at the data.
        """
        if self.why_smooth is not None:
            _warn_of_counts(name, x, type(self).__name__)
        self.check_smooth(name, self.space(p), x)

    def check_smooth(self, name: str, space: Unconstrained, x: Tensor) -> None:
        """Raises ``ValueError`` if the slope in these coordinates moves by jumps and must not.

        Raises:
            NotImplementedError: If torch has no second derivative of the energy.
        """
        if self.why_smooth is not None:
            with remedies_named(name, type(self).__name__):
                refuse_jumps(name, space, x, self.why_smooth)


def _warn_of_counts(name: str, x: Tensor, who: str) -> None:
    """Warns if all of many data are whole numbers: between them there is no slope to be learned."""
    known = x[x.isfinite()]
    if len(known) >= MIN_WHOLE and bool((known == known.round()).all()):
        warnings.warn(
            f"EBM site {name!r}: all of the data are whole numbers, and {who} learns the slope of "
            "a density, of which counts and grey levels have none. Give the distribution a "
            "discrete support and use PseudoLikelihood or DiscreteFisher, or add noise that fills "
            "the steps (x + torch.rand_like(x))",
            SurrogateWarning,
            stacklevel=3,
        )


def signs(u: Tensor, num: int) -> Tensor:
    """Returns independent signs (Rademacher variables), ``(num,)`` + the shape of ``u``."""
    return 2.0 * torch.randint(0, 2, (num, *u.shape), device=u.device).to(u.dtype) - 1.0


def probed_loss(space: Unconstrained, u: Tensor, directions: Tensor) -> Tensor:
    """Returns half the squared score plus the trace of its Jacobian along directions, ``rows``.

    Args:
        space: The coordinates.
        u: The data there, ``rows + event``.
        directions: Shape ``(M,) + rows + event``.
    """
    score, second = space.score_and_curvatures(u, directions)
    return 0.5 * space.event_sum(score.square()) + second.mean(0)
