r"""The banana: a Gaussian bent along a parabola.

The bend has a unit Jacobian, so the normalizer is the Gaussian's own:

.. math::
    E(x) = \frac{x_1^2}{2 s^2} + \tfrac12 \bigl(x_2 - b (x_1^2 - s^2)\bigr)^2, \qquad
    \log Z = \log 2\pi s

The means are 0, :math:`\mathrm{Var}\, x_1 = s^2` and :math:`\mathrm{Var}\, x_2 = 1 + 2 b^2 s^4`.

References:
    Haario, Saksman and Tamminen, Adaptive proposal distribution for random walk Metropolis
    algorithm, Computational Statistics 14, 1999.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.energies.closed_form import ClosedFormEnergy


class Banana(ClosedFormEnergy):
    r"""Banana-shaped density on the plane.

    :math:`x_1 \sim N(0, s^2)` and :math:`x_2 \mid x_1 \sim N(b (x_1^2 - s^2), 1)`.

    Args:
        curvature: Bend ``b``, any sign, shape ``batch``.
        scale: Standard deviation ``s > 0`` of the first coordinate, broadcastable with
            ``curvature``.

    Raises:
        ValueError: If a number given as ``scale`` is not positive.

    Example:
        >>> energy = Banana(curvature=0.5, scale=2.0)
        >>> energy(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
        tensor([0.5000, 0.5000])
    """

    curvature: Tensor
    scale: Tensor

    def __init__(self, curvature: float | Tensor = 1.0, scale: float | Tensor = 1.0) -> None:
        super().__init__((2,))
        self._set("curvature", curvature)
        self._set("scale", scale, positive=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns minus the log density of the bent Gaussian, up to log Z."""
        self._check_event(x)
        first, second = x[..., 0], x[..., 1]
        centre = self._centre(first)
        return 0.5 * ((first / self._arg("scale", x)).square() + (second - centre).square())

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats."""
        return (self.scale.log() + math.log(2 * math.pi)).broadcast_to(self._like().shape)

    @torch.no_grad()
    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws of shape ``shape + batch + (2,)``."""
        like = self._like()
        noise = torch.randn(2, *shape, *like.shape, dtype=like.dtype, device=like.device)
        first = self.scale * noise[0]
        return torch.stack([first, self._centre(first) + noise[1]], -1)

    def _centre(self, first: Tensor) -> Tensor:
        bend = first.square() - self._arg("scale", first).square()
        return self._arg("curvature", first) * bend

    def _like(self) -> Tensor:
        """Returns a tensor of the shape, dtype and device that both arguments broadcast to."""
        return self.curvature * self.scale
