r"""Exact draws of ferromagnetic Ising lattices by monotone coupling from the past.

The heat bath sets spin i to +1 iff :math:`u_i < \sigma(2 (K \sum_{j \sim i} s_j + H))`. With
:math:`K \ge 0` and the same u's, a lattice that starts above another stays above it; so where the
lattices started from all +1 and from all -1 have met, every start has led there. Run from ever
further in the past with the *same* numbers for the same times, the state at time zero is an exact
draw as soon as they meet; a run that is begun anew with fresh numbers until it meets is not. Nor
are draws of which those that take long are left out: who is out of patience must draw otherwise
from the beginning.

Reference:
    Propp, Wilson, Exact sampling with coupled Markov chains and applications to statistical
    mechanics, Random Structures and Algorithms 9, 1996.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["NotCoupledError", "at_most", "ferromagnet"]

MAX_SWEEPS = 2**16
_most: ContextVar[int] = ContextVar("most", default=MAX_SWEEPS)


class NotCoupledError(RuntimeError):
    """Exact draws take longer than they were given."""


@contextmanager
def at_most(num_sweeps: int) -> Iterator[None]:
    """Within the block draws give up after so many sweeps, where they are not told otherwise.

    Args:
        num_sweeps: Sweeps.

    Example:
        >>> with at_most(64):
        ...     x = ferromagnet(torch.zeros(5), torch.zeros(()), torch.Size([3, 4]), periodic=True)
    """
    token = _most.set(num_sweeps)
    try:
        yield
    finally:
        _most.reset(token)


@torch.no_grad()
def ferromagnet(
    coupling: Tensor,
    field: Tensor,
    shape: torch.Size,
    *,
    periodic: bool,
    most: int | None = None,
) -> Tensor:
    """Returns exact draws, ``coupling.shape + shape``.

    Args:
        coupling: K, one per lattice, none negative.
        field: H at every spin, broadcasting with ``coupling.shape + shape``.
        shape: ``(n, m)``.
        periodic: Whether the lattice is a torus.
        most: Sweeps after which to give up; :data:`MAX_SWEEPS`, or those of :func:`at_most`.

    Raises:
        ValueError: If a coupling is negative: the heat bath is then not monotone.
        NotCoupledError: If some lattices have not met after ``most`` sweeps.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> ferromagnet(torch.zeros(5), torch.zeros(()), torch.Size([3, 4]), periodic=True).shape
        torch.Size([5, 3, 4])
    """
    if bool((coupling < 0).any()):
        raise ValueError(
            "coupling from the past needs couplings that are not negative: turn every other spin"
        )
    most = _most.get() if most is None else most
    colors = _colors(shape, periodic=periodic).to(coupling.device)
    batch = coupling.reshape(-1)
    field = field.expand(coupling.shape + shape).reshape(-1, *shape)
    bath = _HeatBath(batch, field, colors, periodic=periodic)
    result = torch.empty((len(batch), *shape), dtype=coupling.dtype, device=coupling.device)
    seeds: list[int] = []
    pending = torch.arange(len(batch), device=coupling.device)
    while len(pending) > 0:
        if 2 ** len(seeds) > most:
            raise NotCoupledError(
                f"{len(pending)} of {len(batch)} lattices did not couple within {most} sweeps, "
                f"couplings up to {float(batch[pending].max()):.3g}: give exchange "
                "auxiliary=Sweeps(), or use sweep() of the energy"
            )
        seeds.append(int(torch.randint(2**62, ())))
        met, state = bath.run(pending, seeds)
        result[pending[met]] = state[met]
        pending = pending[~met]
    return result.reshape(coupling.shape + shape)


class _HeatBath:
    """Sweeps that replay the numbers of the past, block by block."""

    def __init__(self, coupling: Tensor, field: Tensor, colors: Tensor, *, periodic: bool) -> None:
        self.coupling = coupling[:, None, None]
        self.field = field
        self.colors = colors
        self.periodic = periodic

    def run(self, which: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Runs from ``2^len(seeds) - 1`` sweeps ago to now; returns who met, and where.

        Block k, of ``2^k`` sweeps, is seeded by ``seeds[k]`` and lies before the blocks below it.
        """
        k, h = self.coupling[which], self.field[which]
        top = torch.ones((len(which), *self.colors.shape[1:]), dtype=k.dtype, device=k.device)
        both = torch.stack([top, -top])
        for block in reversed(range(len(seeds))):
            generator = torch.Generator(k.device).manual_seed(seeds[block])
            for _ in range(2**block):
                both = self._sweep(both, k, h, generator, which)
        return (both[0] == both[1]).flatten(1).all(1), both[0]

    def _sweep(
        self, both: Tensor, k: Tensor, h: Tensor, generator: torch.Generator, which: Tensor
    ) -> Tensor:
        shape = (len(self.coupling), *self.colors.shape[1:])
        # Drawn for all lattices, so that each keeps its numbers while others drop out.
        u = torch.rand(shape, generator=generator, dtype=k.dtype, device=k.device)[which]
        threshold = 0.5 * torch.logit(u)
        for color in self.colors:
            up = k * _neighbors(both, periodic=self.periodic) + h > threshold
            both = torch.where(color, torch.where(up, 1.0, -1.0).to(k.dtype), both)
        return both


def _neighbors(x: Tensor, *, periodic: bool) -> Tensor:
    """The sum of the spins next to each one, of the shape of ``x``."""
    if periodic:
        return sum((x.roll(step, dim) for dim in (-1, -2) for step in (1, -1)), torch.zeros(()))
    x = torch.nn.functional.pad(x, (1, 1, 1, 1))
    return x[..., 1:-1, 2:] + x[..., 1:-1, :-2] + x[..., 2:, 1:-1] + x[..., :-2, 1:-1]


def _colors(shape: torch.Size, *, periodic: bool) -> Tensor:
    """Sets of sites of which no two are neighbors, ``(number, n, m)``; two if sides allow it."""
    rows, columns = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None, :]
    parity = (rows + columns) % 2
    kind = parity
    if periodic and shape[0] % 2:
        kind = torch.where(rows == shape[0] - 1, 2 + parity, kind)
    if periodic and shape[1] % 2:
        kind = torch.where(columns == shape[1] - 1, 4 + parity, kind)
        kind = torch.where((columns == shape[1] - 1) & (rows == shape[0] - 1), 6, kind)
    return torch.stack([kind.expand(tuple(shape)) == value for value in kind.unique()])
