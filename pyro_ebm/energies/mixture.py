r"""A mixture of isotropic Gaussians: the multimodal test case whose masses are known.

.. math::
    E(x) = -\log \sum_k w_k\, \mathcal N(x; \mu_k, \sigma_k^2 I), \qquad \log Z = \log \sum_k w_k
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.energies.closed_form import ClosedFormEnergy


class GaussianMixtureEnergy(ClosedFormEnergy):
    r"""Mixture of K isotropic Gaussians on :math:`R^d`.

    Args:
        locs: Means, ``batch + (K, d)``.
        scales: Standard deviations, a number or ``batch + (K,)``.
        weights: Positive weights ``batch + (K,)`` that need not sum to one; by default ``1 / K``
            each.

    Raises:
        ValueError: If ``locs`` has fewer than two dims or a number given as ``scales`` is not
            positive.

    Example:
        >>> energy = GaussianMixtureEnergy.ring_of_gaussians(num=8, radius=2.0, scale=0.1)
        >>> energy.event_shape, energy.sample((5,)).shape
        (torch.Size([2]), torch.Size([5, 2]))
        >>> energy.log_normalizer().abs() < 1e-6
        tensor(True)
    """

    locs: Tensor
    scales: Tensor
    weights: Tensor

    def __init__(
        self, locs: Tensor, scales: float | Tensor = 1.0, weights: Tensor | None = None
    ) -> None:
        if locs.dim() < 2:
            raise ValueError(f"locs must have shape (..., K, d), got {tuple(locs.shape)}")
        super().__init__(locs.shape[-1:])
        self._set("locs", locs)
        self._set("scales", scales, positive=True)
        self._set("weights", _uniform(locs) if weights is None else weights)

    @classmethod
    def ring_of_gaussians(
        cls, num: int = 8, radius: float = 2.0, scale: float | Tensor = 0.2
    ) -> GaussianMixtureEnergy:
        """Returns ``num`` equal Gaussians on a circle, the first at ``(radius, 0)``."""
        angles = torch.arange(num, dtype=torch.get_default_dtype()) * (2 * math.pi / num)
        return cls(radius * torch.stack([angles.cos(), angles.sin()], -1), scale)

    @classmethod
    def grid_of_gaussians(
        cls, side: int = 5, spacing: float = 2.0, scale: float | Tensor = 0.1
    ) -> GaussianMixtureEnergy:
        """Returns ``side * side`` equal Gaussians on a square grid centred at the origin."""
        ticks = (torch.arange(side, dtype=torch.get_default_dtype()) - (side - 1) / 2) * spacing
        return cls(torch.cartesian_prod(ticks, ticks), scale)

    def forward(self, x: Tensor) -> Tensor:
        """Returns minus the log of the weighted mixture density."""
        self._check_event(x)
        scales = self._arg("scales", x)
        square = (x.unsqueeze(-2) - self.locs).square().sum(-1) / scales.square()
        volume = self.event_shape[0] * (scales.log() + 0.5 * math.log(2 * math.pi))
        return -torch.logsumexp(self.weights.log() - volume - 0.5 * square, -1)

    def log_normalizer(self) -> Tensor:
        """Returns the log of the total weight."""
        return self.weights.sum(-1).log().broadcast_to(self._component_shape()[:-1])

    @torch.no_grad()
    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws of shape ``shape + batch + (d,)``."""
        components = self._component_shape()
        weights = self.weights.broadcast_to(components)
        k = torch.distributions.Categorical(weights).sample(torch.Size(shape)).unsqueeze(-1)
        scales = self.scales.broadcast_to(components).expand(*shape, *components).gather(-1, k)
        locs = self.locs.expand(*shape, *components, *self.event_shape)
        index = k.unsqueeze(-1).expand(*k.shape, *self.event_shape)
        means = locs.gather(-2, index).squeeze(-2)
        return means + scales * torch.randn_like(means)

    def _component_shape(self) -> torch.Size:
        return torch.broadcast_shapes(self.locs.shape[:-1], self.scales.shape, self.weights.shape)


def _uniform(locs: Tensor) -> Tensor:
    num = locs.shape[-2]
    return torch.full((num,), 1.0 / num, dtype=locs.dtype, device=locs.device)
