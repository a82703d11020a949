r"""Langevin steps whose noise does not match their gradient step, and the temperature this means.

.. math:: q' = q - s\, \mathrm{clip}(\nabla U(q), \pm\delta) + \sigma\, \xi, \qquad \xi \sim N(0, I)

Without the clip and for small s this samples :math:`e^{-U/T}` with the *effective temperature*

.. math:: T = \frac{\sigma^2}{2 s},

and the law p itself only at :math:`T = 1`, which is :class:`~pyro_ebm.mcmc.ULA` with
:math:`s = \epsilon^2/2`, :math:`\sigma = \epsilon`. On :math:`U = a q^2/2` the stationary variance
is exactly :math:`(T/a) / (1 - s a/2)`. Published recipes for images have T near 1e-6: they are
gradient descent with a little noise, their draws lie at the modes, and an energy trained against
such draws is no calibrated density.

The image recipes clip x to its box after every step; here a bounded support is left by no step,
since the chain moves on unconstrained coordinates.

References:
    Du, Mordatch, Implicit generation and modeling with energy-based models, 2019, arXiv:1903.08689;
    Nijkamp et al., Learning non-convergent non-persistent short-run MCMC toward energy-based model,
    2019, arXiv:1904.09770.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import Info, Kernel, State, ran_off
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import positive, whole

__all__ = ["TemperedLangevin"]


class TemperedLangevin(Kernel):
    r"""Unadjusted Langevin with a gradient step and a noise scale of its own.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        gradient_step: :math:`s`, in squared units of the unconstrained coordinates.
        noise_scale: :math:`\sigma` in their units; ``(first, last)`` anneals it geometrically.
        anneal_steps: Steps from the first noise scale to the last, counted anew at every use.
        max_gradient: :math:`\delta`, the largest magnitude of a gradient's component that is
            followed, in nats per unit; ``None`` follows all.
        **options: Those of :class:`~pyro_ebm.mcmc.Kernel`: ``potential_fn``.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> TemperedLangevin(lambda: None, gradient_step=10.0, noise_scale=0.005).temperature
        1.25e-06
    """

    adjusted = False
    evaluates_last = True  # a step ends with its one evaluation, for the next step's use

    def __init__(
        self,
        target: Any = None,
        *,
        gradient_step: float = 0.005,
        noise_scale: float | tuple[float, float] = 0.1,
        anneal_steps: int = 1,
        max_gradient: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        first, last = noise_scale if isinstance(noise_scale, tuple) else (noise_scale, noise_scale)
        self.gradient_step = positive("gradient_step", gradient_step)
        self.noise_scales = (positive("noise_scale", first), positive("noise_scale", last))
        self.anneal_steps = whole("anneal_steps", anneal_steps, least=1)
        self.max_gradient = None if max_gradient is None else positive("max_gradient", max_gradient)

    @property
    def temperature(self) -> float:
        """T at the last noise scale; without the clip, :math:`e^{-U/T}` is what is aimed at."""
        return self.noise_scales[1] ** 2 / (2.0 * self.gradient_step)

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns the count of steps, by which the noise is annealed."""
        return {"iteration": torch.zeros((), dtype=torch.long)}

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain."""
        q = state.position - self.gradient_step * self._clipped(state.gradient)
        q = q + self.noise_scale_at(int(state.tuning["iteration"])) * torch.randn_like(q)
        u, gradient = potential(q)
        moved = replace(state, position=q, potential=u, gradient=gradient)
        count = state.tuning["iteration"] + 1
        return moved.with_tuning(iteration=count), {"diverging": ran_off(moved)}

    def noise_scale_at(self, iteration: int) -> float:
        """Returns the noise scale of a step, the first being 0."""
        first, last = self.noise_scales
        return first * (last / first) ** min(1.0, iteration / max(1, self.anneal_steps - 1))

    def _clipped(self, gradient: Tensor) -> Tensor:
        if self.max_gradient is None:
            return gradient
        return gradient.clamp(-self.max_gradient, self.max_gradient)
