r"""Independent coordinates that share one even energy on the line.

For :math:`E(x) = \sum_i V(x_i)` with :math:`V` even, falling up to a minimiser :math:`m \ge 0` and
rising after it,

.. math::
    \log Z = d\, \log \Bigl( 2 \int_0^\infty e^{-V(x)}\, dx \Bigr).

Both the integral and the draws use the interval :math:`[l, h]` outside of which :math:`V` exceeds
its minimum by more than 45 nats, a relative mass below 1e-18.

*Integral*: the trapezoidal rule, whose error falls exponentially for an analytic integrand that is
even at 0 and has vanished at the ends. The nodes carry no gradient and need none: the integral does
not depend on where they lie.

*Draws*: rejection from the step function that covers :math:`e^{-V}` cell by cell, times a random
sign. No bias is left by the width of the cells, only a few rejections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.energies.closed_form import ClosedFormEnergy, pad_right, sum_event

_CELLS = 256
DEPTH = 45.0
"""Nats above the minimum beyond which the density is taken for zero."""


class EvenProductEnergy(ClosedFormEnergy):
    """Base class: subclasses define ``_curve`` and ``_interval`` of the energy on the line."""

    def _curve(self, x: Tensor, num_dims: int) -> Tensor:
        """Returns V at ``x``, whose last ``num_dims`` dims all share one parameter."""
        raise NotImplementedError

    def _interval(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns lower end, minimiser and upper end on the half line, each ``batch``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum of V over the coordinates of each event."""
        self._check_event(x)
        event_dim = len(self.event_shape)
        return sum_event(self._curve(x, event_dim), event_dim)

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats."""
        nodes, _ = self._nodes()
        log_step = (nodes[..., 1] - nodes[..., 0]).log()
        ends = nodes.new_zeros(_CELLS + 1)
        ends[0] = ends[-1] = -math.log(2.0)
        log_half = log_step + torch.logsumexp(ends - self._curve(nodes, 1), -1)
        return self.event_shape.numel() * (log_half + math.log(2.0))

    @torch.no_grad()
    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws of shape ``shape + batch + event_shape``.

        Raises:
            ValueError: If a parameter is NaN or outside of its range.
        """
        x, accepted = self._propose(shape)
        while not accepted.all():
            again, fresh = self._propose(shape)
            x = torch.where(accepted, x, again)
            accepted = accepted | fresh
        return torch.where(torch.rand_like(x) < 0.5, -x, x)

    def _propose(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns draws from the covering step function and whether to keep them."""
        event_dim = len(self.event_shape)
        nodes, minimiser = self._nodes()
        floor = self._floor(nodes, minimiser)
        full = floor.shape[:-1] + self.event_shape
        floor = pad_right(floor.movedim(-1, 0), event_dim).movedim(0, -1).expand(*full, _CELLS)
        cell = torch.distributions.Categorical(logits=-floor).sample(torch.Size(shape))
        lower = floor.expand(*shape, *floor.shape).gather(-1, cell.unsqueeze(-1)).squeeze(-1)
        start, step = pad_right(nodes[..., 0], event_dim), pad_right(nodes[..., 1], event_dim)
        x = start + (cell + torch.rand_like(lower)) * (step - start)
        return x, torch.rand_like(x).log() < lower - self._curve(x, event_dim)

    def _floor(self, nodes: Tensor, minimiser: Tensor) -> Tensor:
        """Returns the least V in each cell: at an edge, or at the minimiser if inside."""
        edges = self._curve(nodes, 1)
        bottom = self._curve(minimiser.unsqueeze(-1), 1)
        inside = (nodes[..., :-1] <= minimiser.unsqueeze(-1)) & (
            minimiser.unsqueeze(-1) <= nodes[..., 1:]
        )
        return torch.where(inside, bottom, torch.minimum(edges[..., :-1], edges[..., 1:]))

    def _nodes(self) -> tuple[Tensor, Tensor]:
        """Returns the edges of equal cells, ``batch + (cells + 1,)``, and the minimiser."""
        low, minimiser, high = (bound.detach().unsqueeze(-1) for bound in self._interval())
        ticks = torch.linspace(0.0, 1.0, _CELLS + 1, dtype=low.dtype, device=low.device)
        return low + (high - low) * ticks, minimiser.squeeze(-1)
