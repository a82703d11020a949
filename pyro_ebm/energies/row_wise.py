"""Networks that want exactly one batch dim, under any number of leading dims."""

from __future__ import annotations

from torch import Tensor, nn


class RowWise(nn.Module):
    """Calls a network on rows: leading dims are flattened before and restored after.

    Convolutions, ``BatchNorm`` and ``nn.Flatten`` take inputs with one batch dim; chains, particles
    and single latents have none or several. Works for energies and for generators whose parameters
    have no batch dims of their own.

    Args:
        network: A module on inputs of shape ``(rows,) + event``.
        event_dim: Number of dims of one event of its *input*.

    Raises:
        ValueError: When called on an input with fewer dims than an event has.

    Example:
        >>> import torch
        >>> up = nn.Sequential(nn.Linear(4, 9), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 2))
        >>> generator = RowWise(up, event_dim=1)
        >>> generator(torch.zeros(5, 7, 4)).shape, generator(torch.zeros(4)).shape
        (torch.Size([5, 7, 2, 2, 2]), torch.Size([2, 2, 2]))
    """

    def __init__(self, network: nn.Module, event_dim: int) -> None:
        super().__init__()
        self.network = network
        self.event_dim = event_dim

    def forward(self, x: Tensor) -> Tensor:
        """Returns the network's output with the leading dims of ``x``."""
        lead = x.dim() - self.event_dim
        if lead < 0:
            raise ValueError(
                f"RowWise(event_dim={self.event_dim}) was given an input of shape {tuple(x.shape)}"
            )
        out = self.network(x.reshape((-1,) + x.shape[lead:]))
        return out.reshape(x.shape[:lead] + out.shape[1:])
