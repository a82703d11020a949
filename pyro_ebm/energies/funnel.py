r"""Neal's funnel: a scale sampled together with what it scales, as in hierarchical models.

.. math::
    v \sim N(0, s^2), \quad x_i \mid v \sim N(0, e^v): \qquad
    E(v, x) = \frac{v^2}{2 s^2} + \sum_{i=1}^{d-1} \frac{x_i^2 e^{-v} + v}{2}, \qquad
    \log Z = \log s + \tfrac d2 \log 2\pi

References:
    Neal, Slice sampling, Annals of Statistics 31(3), 2003.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.energies.closed_form import ClosedFormEnergy


class Funnel(ClosedFormEnergy):
    """Funnel on ``dim`` coordinates, the first of which is ``v``.

    Args:
        dim: Number of coordinates, at least 2.
        scale: Standard deviation of ``v``, positive, shape ``batch``.

    Raises:
        ValueError: If ``dim < 2`` or a number given as ``scale`` is not positive.

    Example:
        >>> energy = Funnel(dim=3)
        >>> energy(torch.tensor([0.0, 1.0, 1.0]))
        tensor(1.)
        >>> energy.sample((5,)).shape
        torch.Size([5, 3])
    """

    scale: Tensor

    def __init__(self, dim: int = 10, scale: float | Tensor = 3.0) -> None:
        if dim < 2:
            raise ValueError(f"dim must be at least 2, v and one coordinate, got {dim}")
        super().__init__((dim,))
        self._set("scale", scale, positive=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns minus the log density of the funnel, up to log Z."""
        self._check_event(x)
        v, rest = x[..., 0], x[..., 1:]
        inner = rest.square().sum(-1) * (-v).exp() + rest.shape[-1] * v
        return 0.5 * ((v / self._arg("scale", x)).square() + inner)

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats."""
        return self.scale.log() + 0.5 * self.event_shape[0] * math.log(2 * math.pi)

    @torch.no_grad()
    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws of shape ``shape + batch + (dim,)``."""
        size = (*shape, *self.scale.shape, *self.event_shape)
        noise = torch.randn(size, dtype=self.scale.dtype, device=self.scale.device)
        v = (self.scale * noise[..., 0]).unsqueeze(-1)
        return torch.cat([v, (0.5 * v).exp() * noise[..., 1:]], -1)
