r"""Score matching: the Fisher divergence between data and model, without the data's density.

.. math:: \ell(x) = \tfrac12 |s(x)|^2 + \operatorname{tr} \nabla s(x)
    = \tfrac12 |\nabla U(x)|^2 - \Delta U(x), \qquad s = -\nabla U,

is :math:`\tfrac12 E|s - s_{data}|^2` up to a constant after an integration by parts. The exact
trace costs as many backward passes as an event has coordinates. Hutchinson's estimate of it costs
one for each probe v of independent signs,

.. math:: \operatorname{tr} \nabla s = E_v\, v' \nabla s\, v, \qquad
    \mathrm{Var}(v' H v) = 2 \sum_{i \ne j} H_{ij}^2,

which is sliced score matching in its variance-reduced form. On a constrained support all of it is
meant in the unconstrained coordinates, where U includes the Jacobian.

It needs two derivatives in x: for a network of ReLUs, whose slope jumps and whose second derivative
is zero, the integration by parts is wrong, which is refused. It is blind to the weights of
separated modes.

References:
    Hyvärinen, Estimation of non-normalized statistical models by score matching, JMLR 6, 2005;
    Hutchinson, A stochastic estimator of the trace of the influence matrix, Communications in
    Statistics - Simulation and Computation 19, 1990.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.score.score_objective import Probes, ScoreObjective, probed_loss, signs
from pyro_ebm.infer.scoring.deterministic import DeterministicObjective
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.unconstrained import Unconstrained, check_interior
from pyro_ebm.ops.arguments import one_of, whole


class ScoreMatching(ScoreObjective, DeterministicObjective):
    """Score matching with the exact trace, or with Hutchinson's estimate of it.

    With the exact trace it draws nothing, and ``surrogate(model, ScoreMatching())`` is a target of
    MCMC as it is. With probes it is one after ``freeze``.

    Args:
        trace: ``"exact"``, or ``"hutchinson"`` for events of many coordinates.
        num_probes: Probes per datum of the estimate.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: On a support that is not continuous.
        ValueError: If an argument is out of range, the data are integers, or the energy's slope
            jumps, as that of a network of ReLUs does.

    Example:
        >>> p = EnergyDistribution(lambda x: 0.5 * (x**2).sum(-1), event_shape=(3,))
        >>> ScoreMatching().row_losses(p, torch.ones(3))  # 3/2 - 3
        tensor(-1.5000)
        >>> ScoreMatching(trace="hutchinson").row_losses(p, torch.ones(3))  # diagonal Hessian
        tensor(-1.5000)
    """

    def __init__(
        self, *, trace: Literal["exact", "hutchinson"] = "exact", num_probes: int = 1, **elbo: Any
    ) -> None:
        super().__init__(**elbo)
        self.trace = one_of("trace", trace, ("exact", "hutchinson"))
        self.num_probes = whole("num_probes", num_probes, least=1)
        self.is_frozen = trace == "exact"

    def freeze(
        self, model: Callable[..., Any], *args: Any, guide: Any = None, **kwargs: Any
    ) -> Any:
        """Returns this objective if it draws nothing, else one with probes drawn once."""
        if self.is_frozen:
            return self
        return Objective.freeze(self, model, *args, guide=guide, **kwargs)

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Any:
        """Draws probes for every datum; nothing for the exact trace.

        Raises:
            ValueError: If data lie on the support's border.
        """
        if not self.is_frozen:
            return super().draw(p, x, noise)
        check_interior(self.evaluation.site, p, x, "ScoreMatching")
        return None

    def draw_at(self, space: Unconstrained, u: Tensor) -> Probes:
        """Draws signs."""
        return Probes(signs(u, self.num_probes))

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Probes | None, log_z: Tensor
    ) -> Tensor:
        """Returns half the squared score plus the trace of its Jacobian, in squared score units."""
        space = self.space(p)
        u = space.coordinates(p.broadcast_value(x))
        if contrast is not None:
            return probed_loss(space, u, contrast.directions)
        score, trace = space.score_and_trace(u)
        return 0.5 * space.event_sum(score.square()) + trace

    def row_losses(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the loss per datum, with fresh probes where it uses any."""
        x = p.broadcast_value(x)
        contrast = None if self.is_frozen else self.draw(p, x, None)
        return self.per_datum(p, x, contrast, torch.zeros(()))

    def check(self, name: str, p: EnergyDistribution, x: Tensor) -> None:
        """Raises ``ValueError`` if the slope of the energy moves by jumps."""
        self.check_unconditional(name, p, x, None)
