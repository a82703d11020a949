r"""Gibbs sweeps over discrete coordinates with few values.

One coordinate (or one one-hot vector) after the other is drawn from its conditional
:math:`p(x_i = k \mid x_{-i}) \propto e^{-U(x_i = k, x_{-i})}`, the energies of all K values coming
from one call on K times as many chains. No gradient, no tuning, always accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.ops.log_space import draw_by_weight
from pyro_ebm.ops.short_kernel import FlatKernel, Point, Potential

__all__ = ["GibbsSweep", "conditional_potentials"]


def conditional_potentials(
    potential: Potential, x: Tensor, site: int, values: Tensor, event_shape: torch.Size
) -> Tensor:
    """Returns the potential of every value that one coordinate can take, all others held.

    Args:
        potential: Maps ``(K * chains, *batch, *event)`` to ``(K * chains, *batch)``.
        x: States flattened to ``(chains, *batch, sites, width)``.
        site: Which coordinate.
        values: The candidates, shape ``(K, width)``.
        event_shape: The shape of one event.

    Returns:
        Shape ``(K, chains, *batch)``; infinite where the potential is not a finite number.
    """
    candidates = x.expand((len(values),) + x.shape).clone()
    candidates[..., site, :] = values.view((len(values),) + (1,) * (x.dim() - 2) + (-1,))
    # One leading dim only: networks that want (rows, *event) take candidates like any other rows.
    rows = candidates.flatten(0, 1)
    energies = potential(rows.reshape(rows.shape[:-2] + event_shape))
    energies = energies.reshape(candidates.shape[:-2])
    return torch.where(energies.isfinite(), energies, torch.inf)


class GibbsSweep(FlatKernel):
    """One step is a sweep over all coordinates in order.

    Args:
        values: The values of a coordinate, shape ``(K,)``, or ``(K, width)`` for coordinates that
            are vectors along the last event dim, such as one-hot categories.
        event_shape: The shape of one event.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> kernel = GibbsSweep(torch.tensor([0.0, 1.0]), torch.Size([3]))
        >>> certain = lambda x: -100 * x.sum(-1)
        >>> point = kernel.start(certain, torch.zeros(2, 3))
        >>> kernel.events(kernel.step(certain, point)[0])
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    def __init__(self, values: Tensor, event_shape: torch.Size) -> None:
        super().__init__(event_shape)
        self.values = values if values.dim() == 2 else values[:, None]

    def step(
        self, potential: Potential, point: Point, *, adapt: bool = False
    ) -> tuple[Point, Tensor]:
        """Draws every coordinate once from its conditional."""
        x, target = self._sites(point.position).clone(), point.target
        values = self.values.to(x)
        for site in range(x.shape[-2]):
            energies = conditional_potentials(potential, x, site, values, self.event_shape)
            choice = draw_by_weight(-energies)
            x[..., site, :] = values[choice]
            target = energies.gather(0, choice[None])[0]
        return Point(x.flatten(-2), target), torch.ones_like(target)

    def _sites(self, position: Tensor) -> Tensor:
        width = self.values.shape[-1]
        return position.reshape(position.shape[:-1] + (position.shape[-1] // width, width))
