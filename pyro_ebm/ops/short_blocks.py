r"""Which kernel moves which columns of a state.

Continuous columns move together by MALA; every run of discrete columns and every sphere gets a
kernel of its own. A block sees the potential as a function of its own columns, the others held:
:math:`U(x_b \mid x_{-b})`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.ops.constraints import (
    Segment,
    base_measure,
    is_integer,
    plain,
    segments,
    site_values,
    sphere,
)
from pyro_ebm.ops.short_gibbs import GibbsSweep
from pyro_ebm.ops.short_kernel import Kernel, Potential
from pyro_ebm.ops.short_langevin import Langevin
from pyro_ebm.ops.short_walks import IntegerWalk, SphereWalk
from pyro_ebm.ops.spaces import UnconstrainedSpace

__all__ = ["Block", "blocks_of"]

MAX_GIBBS_VALUES = 256
"""Coordinates with more values move by a walk: a Gibbs step would need as many energies."""


@dataclass(frozen=True)
class Block:
    """A kernel and the columns of the last event dim that it moves; ``None`` means all of them."""

    kernel: Kernel
    columns: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """Returns the block's columns of ``x``."""
        return x if self.columns is None else x.index_select(-1, self.columns)

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        """Returns ``x`` with the block's columns replaced.

        Args:
            x: The states, shape ``(chains, *batch, *event)``.
            part: The columns, in as many rows as ``x`` or, for K candidates each, K times as many.
        """
        if self.columns is None:
            return part
        copies = (len(part) // len(x),) + (1,) * (x.dim() - 1)
        return x.repeat(copies).index_copy(-1, self.columns, part)

    def conditional(self, potential: Potential, x: Tensor) -> Potential:
        """Returns the potential of the block's columns given the others in ``x``."""
        if self.columns is None:
            return potential
        return lambda part: potential(self.put(x, part))


def blocks_of(
    support: Constraint,
    event_shape: torch.Size,
    *,
    num_warmup: int = 0,
    device: torch.device | None = None,
) -> list[Block]:
    """Returns the blocks of a support in the order in which they take turns.

    Args:
        support: The support of one event.
        event_shape: The shape of one event.
        num_warmup: How many adapting steps the kernels will take.
        device: Where the states live.

    Raises:
        NotImplementedError: If a part of the support has neither a bijection from the reals nor a
            kernel of its own.
    """
    parts = segments(support, event_shape)
    if len(parts) == 1:
        return [Block(_kernel(parts[0].constraint, event_shape, num_warmup))]
    columns = torch.arange(event_shape[-1], device=device)
    continuous = [part for part in parts if base_measure(part.constraint) == "lebesgue"]
    rest = [part for part in parts if part not in continuous]
    blocks = [_joint_langevin(continuous, columns, event_shape, num_warmup)] if continuous else []
    for part in rest:
        own = columns[part.columns]
        kernel = _kernel(part.constraint, event_shape[:-1] + (len(own),), num_warmup)
        blocks.append(Block(kernel, own))
    return blocks


def _joint_langevin(
    parts: list[Segment], columns: Tensor, event_shape: torch.Size, num_warmup: int
) -> Block:
    own = [columns[part.columns] for part in parts]
    stops = torch.tensor([len(c) for c in own]).cumsum(0).tolist()
    renumbered = [
        Segment(slice(stop - len(c), stop), part.constraint)
        for part, c, stop in zip(parts, own, stops, strict=True)
    ]
    space = UnconstrainedSpace(renumbered, event_shape[:-1] + (stops[-1],))
    return Block(Langevin(space, num_warmup=num_warmup), torch.cat(own))


def _kernel(support: Constraint, event_shape: torch.Size, num_warmup: int) -> Kernel:
    if isinstance(plain(support), type(sphere)):
        return SphereWalk(event_shape)
    values = site_values(support, event_shape)
    if values is not None and len(values) <= MAX_GIBBS_VALUES:
        return GibbsSweep(values, event_shape)
    if is_integer(support):
        return IntegerWalk(plain(support), event_shape)
    return Langevin(UnconstrainedSpace.of(support, event_shape), num_warmup=num_warmup)
