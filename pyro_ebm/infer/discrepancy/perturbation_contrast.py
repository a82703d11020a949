r"""The part of energy discrepancies that does not depend on what perturbs the data.

A perturbation takes x there, :math:`y \sim q(\cdot|x)`, and M times back,
:math:`x'_j \sim \rho_y = q(y|\cdot) / c(y)`; the datum is told from where it could have come from:

.. math::
    L = E\,\log\Big(c(y)\Big[\frac wM + \frac1M \sum_{j=1}^M e^{U(x) - U(x'_j)}\Big]\Big).

log Z cancels row by row. For :math:`w = 1` this is ranking NCE with M exchangeable negatives given
y, hence consistent for every M; other w are biased at finite M
(:mod:`~pyro_ebm.infer.discrepancy.energy_discrepancy` has the limits and the source).
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.discrepancy.perturbations import Perturbation
from pyro_ebm.infer.discrepancy.perturbed_space import PerturbedSpace
from pyro_ebm.infer.scoring.contrast import with_data
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.unconstrained import check_interior


class Negatives(NamedTuple):
    """Data perturbed there and back, in the coordinates that are perturbed.

    Args:
        points: Shape ``(M,) + rows + event``.
        log_ratio: The log of :math:`q(y|x')` over the density that the points are drawn from, in
            nats, ``(M,) + rows``: log c(y) for draws of the way back. ``None`` where it is 0.
        log_mass: log c(y) in nats, ``rows``; ``None`` where it is 0.
    """

    points: Tensor
    log_ratio: Tensor | None = None
    log_mass: Tensor | None = None


class PerturbationContrast(Objective):
    """What energy discrepancies share, whatever the perturbation.

    Args:
        perturbation: The way there and back.
        num_negatives: M.
        stabilization: :math:`w > 0`.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If a number is not positive.

    Warns:
        SurrogateWarning: If ``stabilization`` is not 1.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        num_negatives: int,
        *,
        stabilization: float,
        **elbo: Any,
    ) -> None:
        super().__init__(**elbo)
        if num_negatives < 1 or not stabilization > 0:
            raise ValueError(
                f"num_negatives and stabilization must be positive, got {num_negatives!r} and "
                f"{stabilization!r}; at stabilization 0 the loss is unbounded below"
            )
        if stabilization != 1:
            warnings.warn(
                f"{type(self).__name__} is biased at finite num_negatives unless stabilization is "
                f"1, got {stabilization}",
                SurrogateWarning,
                stacklevel=3,
            )
        self.perturbation = perturbation
        self.num_negatives = num_negatives
        self.stabilization = stabilization

    def space(self, p: EnergyDistribution) -> PerturbedSpace:
        """Returns the coordinates that are perturbed.

        Raises:
            NotImplementedError: If the objective does not serve such data.
        """
        return PerturbedSpace(p, type(self).__name__)

    def perturbation_of(self, p: EnergyDistribution, noise: Any) -> Perturbation:
        """Returns the perturbation, given what a guide holds at the site, or ``None``."""
        return self.perturbation

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Negatives:
        """Draws the negatives, in the coordinates that are perturbed.

        Raises:
            ValueError: If data lie on the border of a continuous support.
        """
        space, perturbation = self.space(p), self.perturbation_of(p, noise)
        check_interior(self.evaluation.site, p, x, type(self).__name__)
        y = perturbation.there(space.coordinates(x), space.layout)
        points = perturbation.back(y, self.num_negatives, space.layout)
        log_mass = perturbation.log_mass(y, space.layout)
        if log_mass is None:
            return Negatives(points)
        return Negatives(points, log_mass.expand(points.shape[: 1 + log_mass.dim()]), log_mass)

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Negatives, log_z: Tensor
    ) -> Tensor:
        """Returns the stabilized log mean exponential difference of potentials, in nats."""
        space = self.space(p)
        points = with_data(space.coordinates(x), contrast.points)
        potential = space.potential(points)
        differences = potential[:1] - potential[1:]
        stabilizer = torch.full_like(differences[:1], math.log(self.stabilization))
        held = differences.detach()
        self.evaluation.note(accuracy=lambda: (held < 0).double())
        if contrast.log_ratio is not None and contrast.log_mass is not None:
            differences = differences + contrast.log_ratio
            stabilizer = stabilizer + contrast.log_mass
        loss = torch.logsumexp(torch.cat([differences, stabilizer]), 0)
        return loss - math.log(self.num_negatives)
