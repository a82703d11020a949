r"""Which rows of a model's sites are independent units, for covariances over data.

The gradient of a loss over several sites is a sum over rows of all of them, and the covariance of
that sum,

.. math:: J = \sum_c n_c \operatorname{Cov}_{u \in c} \Big(\sum_{i \in u} g_i\Big),

is one over units u: rows that stand at the same place of a plate that their sites share belong to
one, for what they have in common beside the parameters is not known. Sites that share no plate are
components c, each with a mean of its own. Where sites share plates crosswise, as rows, columns and
a table of both, no unit is independent of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions.layers import num_reinterpreted


@dataclass(frozen=True)
class Units:
    """The units of rows of all sites, one site after the other.

    Args:
        of_rows: The number of every row's unit, ``(N,)``.
        of_units: The number of every unit's component, ``(U,)``.
    """

    of_rows: Tensor
    of_units: Tensor

    def counting(self, counts: Tensor) -> Units:
        """Returns the units of the rows that count, by a mask ``(N,)``."""
        kept, rows = self.of_rows[counts].unique(return_inverse=True)
        return Units(rows, self.of_units[kept])

    @property
    def num_independent(self) -> int:
        """How many units there are; 1 if a component is a single one, which has no covariance."""
        sizes = self.of_units.unique(return_counts=True)[1]
        return 1 if bool((sizes == 1).any()) else len(self.of_units)

    def sums(self, rows: Tensor) -> Tensor:
        """Returns sums over the rows of every unit, ``(U, D)``, for ``(N, D)``."""
        sums = rows.new_zeros(len(self.of_units), rows.shape[1])
        return sums.index_add_(0, self.of_rows.to(rows.device), rows)

    def components(self, sums: Tensor) -> list[Tensor]:
        """Returns the units' sums component by component, ``(n_c, D)`` each."""
        sizes = self.of_units.unique_consecutive(return_counts=True)[1]
        return list(sums.split(sizes.tolist()))


def units_of(sites: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Units | None:
    """Returns the independent units of sites; ``None`` if they share plates crosswise.

    Args:
        sites: Sites of a trace by name.
        shapes: The shape of each one's rows.
    """
    frames = {name: _frames(site) for name, site in sites.items()}
    of_rows: dict[str, Tensor] = {}
    of_units: list[Tensor] = []
    for number, names in enumerate(_components(frames)):
        common = set.intersection(*(set(frames[name]) for name in names))
        if len(names) > 1 and not common:
            return None
        start = sum(map(len, of_units))
        for name in names:
            own = _places(sites[name], frames[name], shapes[name], common, alone=len(names) == 1)
            of_rows[name] = start + own
        size = 1 + max(int(of_rows[name].max()) for name in names) - start
        of_units.append(torch.full((size,), number))
    return Units(torch.cat([of_rows[name] for name in sites]), torch.cat(of_units))


def _frames(site: Any) -> dict[str, Any]:
    return {frame.name: frame for frame in site["cond_indep_stack"]}


def _components(frames: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Names of sites in groups that share no plate with each other."""
    groups: list[tuple[list[str], set[str]]] = []
    for name, plates in frames.items():
        near = [group for group in groups if group[1] & set(plates)]
        names = [n for group in near for n in group[0]] + [name]
        merged = set(plates).union(*(group[1] for group in near))
        groups = [group for group in groups if group not in near] + [(names, merged)]
    return [names for names, _ in groups]


def _places(
    site: Any, frames: Mapping[str, Any], shape: torch.Size, common: set[str], *, alone: bool
) -> Tensor:
    """The number of every row's unit: its place in the plates that all have, or its own."""
    if alone:
        return torch.arange(shape.numel())
    places, inside = torch.zeros(shape, dtype=torch.long), num_reinterpreted(site["fn"])
    for frame in (frames[name] for name in sorted(common)):
        if frame.dim is None:  # a loop over a plate's rows: one site for each
            places = places * frame.size + frame.counter
            continue
        dim = frame.dim - inside
        index = torch.arange(shape[dim]).reshape((-1,) + (1,) * (-dim - 1))
        places = places * shape[dim] + index
    return places.reshape(-1)
