r"""Narrow Ising lattices, summed column by column: exact log Z and exact draws.

A column of n spins is one of :math:`2^n` states. With the weight :math:`d(s)` of what is inside a
column (its own bonds, the field) and :math:`W(s, s') = \prod_i e^{K s_i s_i'}` of the bonds between
two of them,

.. math:: Z = \sum_{s_1 \dots s_m} d(s_1) W(s_1, s_2) d(s_2) \cdots d(s_m)

takes m products with W, each of them n products with a 2 by 2 matrix. On a torus the last column
meets the first, and the sum is done for every state of the first. Drawing runs back through the
same sums: the last column from its weight, every other one given the one after it.

Reference:
    Reeves, Pettitt, Efficient recursions for general factorisable models, Biometrika 91, 2004.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.ops.log_space import draw_by_weight

__all__ = ["TransferMatrix"]


class TransferMatrix:
    """An Ising lattice of m columns of n spins.

    Args:
        coupling: K, any shape ``batch``.
        field: H, the weight of a spin in nats, broadcasting with ``coupling``.
        shape: ``(n, m)``; the work grows as ``m n 2^n``, and on a torus as ``m n 4^n``.
        periodic: Whether both sides are closed.

    Example:
        >>> strip = TransferMatrix(torch.tensor(0.0), torch.tensor(0.0), (2, 3), periodic=False)
        >>> float(strip.log_normalizer().exp().round())
        64.0
    """

    def __init__(
        self, coupling: Tensor, field: Tensor, shape: tuple[int, int], *, periodic: bool
    ) -> None:
        self.height, self.width = shape
        self.periodic = periodic
        self.dtype = coupling.dtype
        coupling, field = torch.broadcast_tensors(coupling.double(), field.double())
        self.coupling = coupling.unsqueeze(-1)
        states = torch.arange(2**self.height, device=coupling.device)
        self.states = states
        spins = self._spins(states)
        bonds = (spins[:, 1:] * spins[:, :-1]).sum(-1)
        if periodic:
            bonds = bonds + spins[:, 0] * spins[:, -1]
        self.inside = self.coupling * bonds + field.unsqueeze(-1) * spins.sum(-1)

    # --- the sum

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats, ``batch``, differentiable in coupling and field."""
        weights = self._closed() if self.periodic else self._forward(self.inside, self.width)[-1]
        return torch.logsumexp(weights, -1).to(self.dtype)

    def _forward(self, first: Tensor, num_columns: int) -> list[Tensor]:
        """Log weights of the columns up to each one, by that one's state, ``(..., 2^n)`` each."""
        columns = [first]
        for _ in range(num_columns - 1):
            columns.append(self.inside + self._across(columns[-1]))
        return columns

    def _across(self, log_weight: Tensor) -> Tensor:
        """The log of the product of weights with W, ``(..., 2^n)``."""
        top = log_weight.detach().amax(-1, keepdim=True)
        weight = torch.exp(log_weight - top)
        same, other = torch.exp(self.coupling), torch.exp(-self.coupling)
        for i in range(self.height):
            pair = weight.reshape(weight.shape[:-1] + (-1, 2, 2**i))
            turned = same.unsqueeze(-1).unsqueeze(-1) * pair + (
                other.unsqueeze(-1).unsqueeze(-1) * pair.flip(-2)
            )
            weight = turned.reshape(weight.shape)
        return top + weight.log()

    def _closed(self) -> Tensor:
        """Log weights of all tori by their first column's state, ``(..., 2^n)``."""
        lead = self.inside.shape[:-1]
        states = self.states.reshape((-1,) + (1,) * len(lead))
        second = self.inside + self._bond(states)  # given the first, on a new first dim
        last = self._across(self._forward(second, self.width - 1)[-1])
        index = states.unsqueeze(-1).expand((-1, *lead, 1))
        return self.inside + last.gather(-1, index).squeeze(-1).movedim(0, -1)

    def _bond(self, state: Tensor) -> Tensor:
        """The log of ``W(., s)``, ``(..., 2^n)`` for states of shape ``(...)``."""
        differ = self._spins(self.states ^ state.unsqueeze(-1))
        return -self.coupling * differ.sum(-1)  # which counts what differs less what does not

    def _spins(self, states: Tensor) -> Tensor:
        """Spins ``(..., n)`` of states, the bits of a number; bit 1 is +1."""
        bits = (states.unsqueeze(-1) >> torch.arange(self.height, device=states.device)) & 1
        return 2.0 * bits.double() - 1.0

    # --- draws

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Returns exact draws, ``shape + batch + (n, m)`` of -1 and +1."""
        lead = torch.Size(shape) + self.inside.shape[:-1]
        drawn = self._torus(lead) if self.periodic else self._strip(lead)
        return self._spins(torch.stack(drawn, -1)).movedim(-1, -2).to(self.dtype)

    def _strip(self, lead: torch.Size) -> list[Tensor]:
        columns = self._forward(self.inside, self.width)
        last = draw_by_weight(columns[-1].expand(lead + self.states.shape), -1)
        return self._back(columns, last)

    def _torus(self, lead: torch.Size) -> list[Tensor]:
        first = draw_by_weight(self._closed().expand(lead + self.states.shape), -1)
        columns = self._forward(self.inside + self._bond(first), self.width - 1)
        last = draw_by_weight(columns[-1] + self._bond(first), -1)
        return [first, *self._back(columns, last)]

    def _back(self, columns: list[Tensor], last: Tensor) -> list[Tensor]:
        """Every column given the one after it."""
        drawn = [last]
        for weights in reversed(columns[:-1]):
            drawn.append(draw_by_weight(weights + self._bond(drawn[-1]), -1))
        return drawn[::-1]
