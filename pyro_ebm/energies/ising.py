r"""The Ising model on a lattice.

.. math:: E(s) = -K \sum_{<ij>} s_i s_j - H \sum_i s_i, \qquad s_i \in \{-1, +1\},

each bond counted once. Log Z is exact on a torus without a field (Kaufman's formula, any size) and
on narrow lattices (transfer matrix), and only there; so are draws by the transfer matrix. Others
can be drawn exactly by coupling from the past, in a time that explodes beyond the critical coupling
:math:`|K| = \log(1 + \sqrt 2) / 2 \approx .4407`: ferromagnets, :math:`K \ge 0`, on any lattice,
antiferromagnets where every other spin can be turned over, on all but a torus with an odd side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.energies.exponential_family import ExponentialFamily
from pyro_ebm.ops.constraints import event_support, spins
from pyro_ebm.ops.coupling_from_the_past import ferromagnet
from pyro_ebm.ops.kaufman import torus_log_normalizer
from pyro_ebm.ops.staggered import turned
from pyro_ebm.ops.swendsen_wang import swendsen_wang
from pyro_ebm.ops.transfer_matrix import TransferMatrix

_MAX_STRIP = 12  # rows that a transfer matrix takes: 2^12 states of a column
_MAX_TORUS = 8  # where it takes 4^8


class Ising(ExponentialFamily):
    """Ising model on an n by m lattice of spins -1 and +1.

    Args:
        coupling: K in nats, one number per lattice; positive is ferromagnetic.
        shape: ``(n, m)``.
        field: H in nats, one number per lattice, too; left out if not given. One for every spin,
            as under a covariate, is another family: a subclass of
            :class:`~pyro_ebm.energies.ExponentialFamily`, with a statistic for each covariate.
        periodic: Whether the lattice is a torus. Its sides are then at least 3.

    Raises:
        ValueError: If the shape is not one of two sides, or too small for a torus, or there is one
            coupling and a field for every spin.

    Example:
        >>> energy = Ising(0.4, (3, 3))
        >>> energy(torch.ones(3, 3))
        tensor(-7.2000)
        >>> energy.is_tractable, Ising(0.4, (32, 32), field=0.1).is_tractable
        (True, False)
    """

    coupling: Tensor
    field: Tensor
    is_sampleable = True

    def __init__(
        self,
        coupling: float | Tensor,
        shape: Sequence[int],
        *,
        field: float | Tensor | None = None,
        periodic: bool = True,
    ) -> None:
        if len(shape) != 2 or min(shape) < (3 if periodic else 1):
            raise ValueError(
                f"shape must be (n, m), on a torus at least (3, 3), got {tuple(shape)}; smaller "
                "lattices need periodic=False"
            )
        super().__init__(tuple(shape), event_support(spins, 2))
        self.periodic = periodic
        self.coefficients = ("coupling",) if field is None else ("coupling", "field")
        self._set("coupling", coupling)
        if field is not None:
            self._set("field", field)
            self._check_field()

    def _check_field(self) -> None:
        """A field shaped as the lattice would be a batch of lattices, each under one number."""
        a_lattice = self.event_shape
        if self.field.shape[-2:] == a_lattice and self.coupling.shape[-2:] != a_lattice:
            raise ValueError(
                f"field is one number per lattice, and one of shape {tuple(self.field.shape)} "
                f"would make a batch of lattices. For a field at every spin write a family with a "
                "statistic for each covariate: a subclass of ExponentialFamily whose statistics(x) "
                "stacks the sum over bonds and (x * z).sum((-2, -1)). If a batch is meant, expand "
                "coupling to it"
            )

    def statistics(self, x: Tensor) -> Tensor:
        """Returns the sum over bonds and, with a field, the sum of spins, ``(..., p)``."""
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        sums = [self._bonds(x, -1) + self._bonds(x, -2)]
        if "field" in self.coefficients:
            sums.append(x.sum((-2, -1)))
        return torch.stack(sums, -1)

    def _bonds(self, x: Tensor, dim: int) -> Tensor:
        size = x.shape[dim]
        bonds = (x.narrow(dim, 1, size - 1) * x.narrow(dim, 0, size - 1)).sum((-2, -1))
        if not self.periodic:
            return bonds
        return bonds + (x.select(dim, 0) * x.select(dim, -1)).sum(-1)

    # --- what is exact

    @property
    def is_tractable(self) -> bool:  # type: ignore[override]
        """Whether log Z is known in closed form or by a sum that can be done."""
        return self._is_narrow or self._has_formula

    @property
    def _has_formula(self) -> bool:
        return self.periodic and self.coefficients == ("coupling",)

    @property
    def _is_narrow(self) -> bool:
        return min(self.event_shape) <= (_MAX_TORUS if self.periodic else _MAX_STRIP)

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats, differentiable in coupling and field.

        Where both sides of a wide torus are not even, negative couplings give NaN: no formula is
        known to us.

        Raises:
            NotImplementedError: If the lattice is wide and has a field or a rim.
        """
        is_even = all(size % 2 == 0 for size in self.event_shape)
        if self._has_formula and (is_even or not self._is_narrow):
            return torus_log_normalizer(self.coupling, (self.event_shape[0], self.event_shape[1]))
        if not self._is_narrow:
            raise NotImplementedError(
                f"log Z of a lattice of shape {tuple(self.event_shape)} is known on a torus "
                "without a field only: estimate it by pyro_ebm.normalizers"
            )
        return self._transfer_matrix().log_normalizer()

    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws, ``shape + batch + (n, m)``.

        Raises:
            ValueError: If the lattice is a wide torus with an odd side and a coupling is negative.
            RuntimeError: If coupling from the past takes too long, as it does in large lattices
                with couplings beyond the critical one.
        """
        if self._is_narrow:
            drawn = self._transfer_matrix().sample(tuple(shape))
            return drawn.mT if self._is_flat else drawn
        coupling, field = self._pair()
        batch = torch.Size(shape) + coupling.shape
        signs = turned(coupling, self.event_shape, periodic=self.periodic)
        drawn = ferromagnet(
            coupling.abs().expand(batch),
            signs * field[..., None, None],
            self.event_shape,
            periodic=self.periodic,
        )
        return signs * drawn

    def sweep(self, x: Tensor, num_sweeps: int) -> Tensor:
        """Returns lattices after Swendsen-Wang sweeps.

        Raises:
            ValueError: If a coupling is negative on a torus with an odd side.
        """
        coupling, field = self._pair()
        signs = turned(coupling, self.event_shape, periodic=self.periodic)
        at_spins = signs * field[..., None, None] if "field" in self.coefficients else None
        moved = swendsen_wang(
            signs.to(x.dtype) * x,
            coupling.abs(),
            at_spins,
            periodic=self.periodic,
            num_sweeps=num_sweeps,
        )
        return signs.to(x.dtype) * moved

    def _pair(self) -> tuple[Tensor, Tensor]:
        coupling = self.coupling
        field = getattr(self, "field", torch.zeros_like(coupling))
        return torch.broadcast_tensors(coupling, field)

    @property
    def _is_flat(self) -> bool:
        return self.event_shape[0] > self.event_shape[1]

    def _transfer_matrix(self) -> TransferMatrix:
        short, long = sorted(self.event_shape)
        return TransferMatrix(*self._pair(), (short, long), periodic=self.periodic)
