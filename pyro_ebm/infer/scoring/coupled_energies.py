"""Energies of one event that change with other events: no law of a row has such an energy.

Contrasts, chains and particles stand in dims before those of the rows, and objectives evaluate the
energy on data and contrast together. In a network written for ``(rows,) + event``, dim 1 is then
that of the rows: ``softmax(h, 1)`` compares rows with each other, ``x - x.mean(0)`` mixes data and
contrast, and so do batch statistics. The shape of the result is right, and another energy is
learned.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.ops.coupled_rows import are_coupled
from pyro_ebm.poutine.aside import aside

__all__ = ["refuse_coupled"]


def refuse_coupled(name: str, p: EnergyDistribution, x: Tensor) -> None:
    """Raises ``ValueError`` if the energy of an event changes with the events beside it.

    Rows keep their places, and with them the contexts that an energy may have.

    Args:
        name: The site.
        p: Its law.
        x: Its data, ``rows + event``.
    """
    with aside():
        coupled = _are_coupled(p, x)
    if coupled:
        raise ValueError(
            f"EBM site {name!r}: the energy of one event changes with the other events of the "
            "batch. Contrasts and chains stand in dims before the rows, so that dim 0 and dim 1 "
            "are not what they are for (rows,) + event: count dims from the right (dim=-1 in "
            "normalize, softmax, mean), or wrap the network as "
            f"pyro_ebm.energies.RowWise(network, event_dim={len(p.event_shape)}). Replace "
            "BatchNorm by LayerNorm or GroupNorm, or put it in eval mode"
        )


def _are_coupled(p: EnergyDistribution, x: Tensor) -> bool:
    """Looks at the rows beside a copy of themselves, as contrasts are; alone where that fails.

    A network that takes rows only serves objectives that evaluate nothing else.
    """
    for points in (torch.stack([x, x]), x):
        with suppress(Exception):  # energies may do anything with dims that they do not expect
            return are_coupled(p.energy, points, len(rows_of(p, points)))
    return False
