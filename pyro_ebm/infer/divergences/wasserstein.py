r"""A Wasserstein critic, for comparison: what of a GEBM's success is due to its likelihood?

With :math:`f = -E`, data P and base Q,

.. math:: L = E_Q f - E_P f + \lambda\, E\big[ (\lVert \nabla f(\hat x) \rVert - c)^2 \big],

:math:`\hat x` between a datum and a base draw. Where f is 1-Lipschitz :math:`-L` is a lower bound
of the Wasserstein-1 distance. Two penalties are in use, which are *not* the same objective:

- ``centre=1`` (WGAN-GP) draws slopes towards 1 in length, the slope of an optimal critic;
- ``centre=0`` (GEBM, MEG) draws them towards 0: the optimum is a smoothed critic of a scale
  that :math:`\lambda` sets, so that :math:`-L` is in no units of distance. In one dimension, and
  for points spread over [0, 1] between Diracs at 0 and 1, the slope is
  :math:`1 + 1/(2\lambda)` under the first and :math:`1/(2\lambda)` under the second.

f is not a log ratio of densities: E is defined up to a constant *and to scale*, so
:math:`e^{-E}` is no density, there is no log Z to hand on, and asking for one is an error. A
generator is the second player and minimizes :math:`-E_Q f`.

References:
    Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville, Improved training of Wasserstein GANs,
    NeurIPS 2017, arXiv:1704.00028; Arbel, Zhou, Gretton, Generalized Energy-Based Models, ICLR
    2021, arXiv:2003.05033.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.divergences.base_contrast import BaseContrast
from pyro_ebm.infer.scoring.contrast import Contrast, gap, rows_of
from pyro_ebm.ops.log_normalizer import LogNormalizer

NO_LOG_RATIO = (
    "a Wasserstein critic is not a log ratio of densities (its scale is set by the penalty)"
)
REMEDY = "Learn the energy with KALE, DonskerVaradhan or NCE"


class WassersteinCritic(BaseContrast):
    r"""The critic of a Wasserstein GAN, with minus the energy for the critic; for comparison only.

    Args:
        num_base: Base draws per batch, rounded up to a multiple of its rows; ``None`` draws as many
            as there are rows.
        gradient_penalty: :math:`\lambda > 0`; without it the critic grows without bound.
        centre: The length of slope that costs nothing: 1 for WGAN-GP, 0 for the penalty of GEBMs.
        schedule: ``(critic steps, generator steps)``, for example ``(5, 1)``; ``None`` leaves the
            generator alone.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If the penalty is not positive or the centre neither 0 nor 1.
        NotImplementedError: When asked for a log normalizer, or to be frozen.

    Example:
        >>> critic = WassersteinCritic(gradient_penalty=10.0, centre=1, schedule=(5, 1))
        >>> critic.is_held_out_criterion
        False
    """

    is_held_out_criterion = False
    why_not_frozen = f"{NO_LOG_RATIO}, and no posterior can be built on it. {REMEDY}"

    def __init__(
        self,
        num_base: int | None = None,
        *,
        gradient_penalty: float = 10.0,
        centre: int = 1,
        schedule: tuple[int, int] | None = None,
        **elbo: Any,
    ) -> None:
        super().__init__(num_base, gradient_penalty, schedule, **elbo)
        if not gradient_penalty > 0:
            raise ValueError(
                "gradient_penalty must be positive, or the critic grows without bound, got "
                f"{gradient_penalty!r}"
            )
        if centre not in (0, 1):
            raise ValueError(f"centre must be 1 (WGAN-GP) or 0 (as in GEBMs), got {centre!r}")
        self.centre = centre

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws from the base or the guide's site, whose density is of no use here."""
        return super().draw(p, x, noise)._replace(log_noise=None)

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns the critic's loss of a datum and its base draws, with its penalty."""
        loss = gap(p.energy(contrast.with_data(x)))
        self.evaluation.note(critic_gap=-loss)
        return loss + self.penalty(p, x, contrast)

    def penalty(self, p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor:
        """Returns the penalty per datum on the length of the critic's slope."""
        norm = torch.linalg.vector_norm(self.slope(p, x, contrast), dim=-1)  # no NaN at slope 0
        self.evaluation.note(gradient_norm=norm)
        return self.gradient_penalty * (norm - self.centre).square()

    def second_player(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Tensor:
        """Returns the generator's loss: its draws' mean energy, energy held."""
        values = self.values_of_generator(p, x, noise)
        loss = -values.mean(0)
        self.evaluation.note(generator_loss=loss)
        return loss.expand(rows_of(p, x))

    def log_normalizer(self, site: str) -> LogNormalizer:
        """Raises: a critic is no log ratio of densities."""
        raise NotImplementedError(
            f"{NO_LOG_RATIO}, and no log Z of site {site!r} can be handed on. {REMEDY}"
        )
