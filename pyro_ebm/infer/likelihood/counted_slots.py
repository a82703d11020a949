"""Chains that persist, with how long each of them has been standing still.

A kernel that is told by its mean acceptance alone may leave some chains where they are for good.
Which they are can only be seen slot by slot, over many uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.runs.replay_buffer import Slots


class CountedSlots(Slots):
    """Slots that count how often each was used in a row without a move.

    Takes the arguments of its base.

    Attributes:
        idle: Uses since the state last changed, ``(size,)``.

    Example:
        >>> slots = CountedSlots(2, num_steps=5, restart_prob=0.0)
        >>> slots.fill(torch.zeros(2, 1))
        >>> for _ in range(3):
        ...     slots.write(torch.arange(2), torch.tensor([[0.0], [1.0]]), lost=torch.zeros(2) > 0)
        >>> slots.idle
        tensor([3, 2])
    """

    def __init__(self, size: int, *, num_steps: int, restart_prob: float) -> None:
        super().__init__(size, num_steps=num_steps, restart_prob=restart_prob)
        self.idle = torch.zeros_like(self.ages)

    def fill(self, positions: Tensor) -> None:
        """Puts a first state into every slot, none of which has been used."""
        super().fill(positions)
        self.idle = torch.zeros_like(self.ages)

    def to(self, device: torch.device) -> None:
        """Moves states and counts to another device, in case they are elsewhere."""
        super().to(device)
        self.idle = self.idle.to(device)

    def write(self, slots: Tensor, q: Tensor, *, lost: Tensor) -> None:
        """Writes states back as its base does, and counts those that are what they were."""
        changed = (q != self.positions[slots]).reshape(len(q), -1).any(-1)  # type: ignore[index]
        self.idle[slots] = torch.where(changed, 0, self.idle[slots] + 1)
        super().write(slots, q, lost=lost)

    # --- saving

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts too: what is said after a restart depends on them."""
        return {**super().state_dict(), "idle": self.idle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state, of older ones without counts; see the base."""
        super().load_state_dict(state)
        self.idle.copy_(state.get("idle", torch.zeros_like(self.idle)))
