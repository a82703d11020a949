r"""The part that bounds and critics of an energy relative to a base have in common.

Data :math:`P` are compared with draws of a base :math:`Q`, pooled over the rows of a batch, by the
energy alone: the base need not have a density. Where the guide holds a contrast with a density
:math:`q`, U and :math:`\log q` take the place of the energy.

Two things keep the comparison finite and useful. The penalty :math:`\lambda |\nabla_x E|^2` at
points between data and base draws, centred at zero, keeps the energy smooth. And the base may be
the law of a generator, the second player: with the energy held it lowers
:math:`-\log E_z e^{-E(G(z))}`, which by the envelope theorem is what it would gain under
:math:`-\log Z`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import (
    EnergyDistribution,
    GeneralizedEBM,
    PushforwardDistribution,
)
from pyro_ebm.distributions.layers import innermost
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.scoring.conditional import depends_on_rows
from pyro_ebm.infer.scoring.conditional_generators import check_generator
from pyro_ebm.infer.scoring.contrast import Contrast, contrast_law, rows_of
from pyro_ebm.infer.scoring.held import hold_parameters
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.second_derivatives import check_second_derivatives


class BaseContrast(Objective):
    r"""What objectives share that compare data with draws of a base.

    Args:
        num_base: Base draws per batch, rounded up to a multiple of its rows; ``None`` draws as many
            as there are rows.
        gradient_penalty: :math:`\lambda \ge 0`.
        schedule: Steps of the energy and of the generator; ``None`` leaves the generator alone.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If an argument is out of range.
    """

    needs_density = False
    has_second_player = True

    def __init__(
        self,
        num_base: int | None,
        gradient_penalty: float,
        schedule: tuple[int, int] | None,
        **elbo: Any,
    ) -> None:
        super().__init__(schedule=schedule, **elbo)
        if num_base is not None and num_base < 1:
            raise ValueError(
                f"num_base must be a positive number of draws or None, got {num_base!r}"
            )
        if gradient_penalty < 0:
            raise ValueError(f"gradient_penalty must not be negative, got {gradient_penalty!r}")
        self.num_base = num_base
        self.gradient_penalty = gradient_penalty
        self._looked_at_base = False

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws from the base, as many points as rows or more, pooled over the rows."""
        law = self.evaluation.once("law", lambda: self._law(p, x, noise))
        points = law.sample(torch.Size((self._draws_per_row(p, x),)))
        between = self._between(p, x, points[0]) if self.gradient_penalty else None
        if noise is None and self.schedule is None and not self._looked_at_base:
            self._looked_at_base = True
            _warn_of_idle(law, points, type(self).__name__)
        if noise is None or not _has_density(law):
            return Contrast(points, between=between)
        log_noise = law.log_prob(points)
        if self.schedule is None:  # else the law follows the data
            self.evaluation.noise = lambda: (law.log_prob(x.to(points.dtype)), log_noise)
        return Contrast(points, log_noise, between=between)

    def check_unconditional(
        self, name: str, p: EnergyDistribution, x: Tensor, known: Tensor | None
    ) -> None:
        """Raises ``ValueError`` if rows need a log Z each, or have a generator each.

        A generator of every row's own is one law of rows and contexts together, if the energy sees
        the contexts too or log Z is known for each.

        Raises:
            NotImplementedError: If slopes are penalized, and torch cannot differentiate them.
        """
        super().check_unconditional(name, p, x, known)
        if self.gradient_penalty:
            check_second_derivatives(name, p, x, f"the gradient_penalty of {type(self).__name__}")
        is_joint = known is not None or p.conditional or depends_on_rows(p, x)
        if self.pools_rows or not is_joint:
            law = self.evaluation.once("law", lambda: None)  # what was drawn from
            check_generator(name, p, x, law, type(self).__name__)

    def _law(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Any:
        has_density = noise is not None and _has_density(noise)
        if has_density and isinstance(p, GeneralizedEBM):
            raise ValueError(
                f"the guide holds {type(noise).__name__} for {p!r}, whose energy refers to its "
                "generator's law: take the site out of the guide, or let it hold a "
                "PushforwardDistribution"
            )
        return contrast_law(noise, p, x, needs_density=has_density, who=type(self).__name__)

    @staticmethod
    def _between(p: EnergyDistribution, x: Tensor, points: Tensor) -> Tensor:
        share = torch.rand(rows_of(p, x), dtype=x.dtype, device=x.device)
        share = share.reshape(share.shape + (1,) * len(p.event_shape))
        return torch.lerp(x, points.to(x.dtype), share)

    def _draws_per_row(self, p: EnergyDistribution, x: Tensor) -> int:
        rows = max(1, rows_of(p, x).numel())
        return 1 if self.num_base is None else math.ceil(self.num_base / rows)

    def log_ratios(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast
    ) -> tuple[Tensor, Tensor]:
        """Returns minus the energy, at data ``rows`` and base draws ``(M,) + rows``, in one call.

        Relative to the base; with a contrast of known density, minus U and over that density.
        """
        values = self.evaluation.once("log_ratios", lambda: _log_ratios(p, x, contrast))
        self.evaluation.note_weights("weight_ess", values[1:])
        return values[0], values[1:]

    def penalty(self, p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor | float:
        """Returns the penalty per datum on the energy's squared gradient.

        It is taken at points between data and base draws.
        """
        if not self.gradient_penalty:
            return 0.0
        squared = self.slope(p, x, contrast).square().sum(-1)
        self.evaluation.note(gradient_norm=squared.sqrt())
        return self.gradient_penalty * squared

    @staticmethod
    def slope(p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor:
        """Returns the energy's gradient at the points between data and base, ``rows + (d,)``."""
        # Unlike autograd.grad, this leaves no leaf that would look like a lost parameter.
        slope = torch.func.grad(lambda at: p.energy(at).sum())(contrast.between)
        return slope.reshape((*rows_of(p, x), -1))

    def second_player(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Tensor:
        """Returns the generator's loss: minus the log mean weight of its draws, energy held."""
        values = self.values_of_generator(p, x, noise)
        loss = -self.evaluation.log_mean_exp(values)
        self.evaluation.note(generator_loss=loss)
        return loss.expand(rows_of(p, x))

    def values_of_generator(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Tensor:
        """Returns minus the energy at fresh base draws, ``(M,) + rows``.

        Gradients go to the draws alone.

        Raises:
            ValueError: If the base cannot draw with gradients.
        """
        law = self._law(p, x, noise)
        if not law.has_rsample:
            raise ValueError(
                f"{type(self).__name__}(schedule={self.schedule}) trains a generator, but the base "
                f"{type(law).__name__} cannot draw with gradients: use a PushforwardDistribution"
            )
        points = law.rsample(torch.Size((self._draws_per_row(p, x),)))
        return hold_parameters(lambda y: -p.energy(y), points, len(p.event_shape))


def _log_ratios(p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor:
    points = contrast.with_data(x)
    if contrast.log_noise is None:
        return -p.energy(points)
    noise = torch.cat([torch.zeros_like(contrast.log_noise[:1]), contrast.log_noise])
    return p.unnormalized_log_prob(points) - noise


def _warn_of_idle(law: Any, points: Tensor, who: str) -> None:
    """Warns where a base has parameters that no loss of the energy moves."""
    if not _has_density(law):  # a generator at rest
        return
    with torch.enable_grad():
        if not law.log_prob(points.detach()).requires_grad:
            return
    warnings.warn(
        f"{who} compares data with draws of the base by the energy alone, so that the parameters "
        f"of the base {type(innermost(law)).__name__} stay where they are: give schedule=(1, 1) to "
        "train it as the second player, learn it by NCE, or detach them",
        SurrogateWarning,
        stacklevel=2,
    )


def _has_density(law: Any) -> bool:
    return not isinstance(innermost(law), PushforwardDistribution)
