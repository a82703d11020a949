r"""Where perturbed data live: real coordinates, discrete sites, or tables with columns of both.

Continuous columns are perturbed in unconstrained coordinates :math:`x = T(u)`, in which the
potential is :math:`U(T(u)) - \log|\det J_T(u)|`. Discrete ones keep the numbers they are stored as;
what a site can be is an equally spaced list, each site its own
(:mod:`~pyro_ebm.ops.ladders`). An event of a table becomes a
vector with its real coordinates first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.ops.constraints import (
    Segment,
    base_measure,
    segments,
)
from pyro_ebm.ops.graph_recording import is_recording
from pyro_ebm.ops.ladders import Ladder, ladder_beside
from pyro_ebm.ops.spaces import UnconstrainedSpace, bijection

__all__ = ["Layout", "PerturbedSpace", "Sites"]


class Sites(Ladder):
    """Ladders with an end, the same in all rows: tensors of event shape.

    Example:
        >>> from pyro.distributions import constraints
        >>> sites = Sites.of(constraints.integer_interval(1, 3), torch.Size([2]), "A test")
        >>> sites.numbers(torch.tensor([1.0, 3.0]))
        tensor([0, 2])
    """

    @classmethod
    def of(cls, support: Constraint, event_shape: torch.Size, who: str) -> Sites:
        """Reads them off a support.

        Raises:
            NotImplementedError: If a site's values are no finite list of numbers.
        """
        return cls.beside(segments(support, event_shape), event_shape, who)

    @classmethod
    def beside(cls, parts: Sequence[Segment], event_shape: torch.Size, who: str) -> Sites:
        """Joins the sites of some columns of the last event dim.

        Raises:
            NotImplementedError: If a site's values are no finite list of numbers.
        """
        ladder = ladder_beside(parts, event_shape)
        if ladder is None or ladder.num.dim() > len(event_shape) or not bool(ladder.num.all()):
            raise NotImplementedError(
                f"{who} needs sites with a finite list of values each, the same in all rows "
                "(boolean, spins, integer_interval), got support "
                f"{', '.join(str(part.constraint) for part in parts)}; give counts an upper bound "
                "or use DiscreteFisher, and store one-hot vectors as categories"
            )
        return cls(*ladder)

    def numbers(self, x: Tensor) -> Tensor:
        """Returns which of its values every site of ``x`` has, integers shaped as ``x``.

        Raises:
            ValueError: If a site has none of them.
        """
        numbers = super().numbers(x)
        if is_recording():  # steps that are not replayed look at the values
            return numbers
        is_value = (numbers >= 0) & (numbers < self.num) & (self.value(numbers, x) == x)
        if not bool(is_value.all()):
            raise ValueError(
                "the data must lie in the support, but a site holds none of its values; categories "
                "are the integers of integer_interval, and NaN is none. Mask missing rows"
            )
        return numbers


def _is_counted(support: Constraint) -> bool:
    return base_measure(support) == "counting"


class Layout(NamedTuple):
    """What the coordinates of an event are.

    Args:
        event_dim: How many rightmost dims make an event.
        num_real: Real coordinates, the first of a vector; 0 where all are discrete.
        sites: The discrete ones; ``None`` where all are real.
    """

    event_dim: int
    num_real: int = 0
    sites: Sites | None = None

    def rows(self, u: Tensor) -> torch.Size:
        """Returns the shape of the rows of ``u``."""
        return u.shape[: u.dim() - self.event_dim]

    def beside_event(self, values: Tensor) -> Tensor:
        """Returns values per row with the dims of an event, to broadcast with ``u``."""
        return values.reshape(values.shape + (1,) * self.event_dim)


class PerturbedSpace:
    """An EBM's potential in the coordinates that are perturbed.

    Args:
        p: The EBM.
        who: The objective, for messages.

    Raises:
        NotImplementedError: On the sphere, where a continuous column has no bijection from the
            reals, where a site's values are no finite list, and for mixed events that are no
            vectors.

    Example:
        >>> from pyro.distributions import constraints
        >>> support = constraints.cat([constraints.positive, constraints.boolean], -1, [1, 1])
        >>> p = EnergyDistribution(lambda x: x.sum(-1), event_shape=(2,), support=support)
        >>> PerturbedSpace(p, "A test").coordinates(torch.tensor([1.0, 1.0]))  # log 1, and a bit
        tensor([0., 1.])
    """

    def __init__(self, p: EnergyDistribution, who: str) -> None:
        self._p = p
        self._measure = p.base_measure
        event_shape = p.event_shape
        if self._measure == "lebesgue":
            self._transform = bijection(p.support, len(event_shape))
            self.layout = Layout(self._transform.domain.event_dim)
        elif self._measure == "counting":
            self.layout = Layout(len(event_shape), 0, Sites.of(p.support, event_shape, who))
        elif self._measure == "mixed" and len(event_shape) == 1:
            self._columns(who)
        else:
            raise NotImplementedError(
                f"{who} perturbs real coordinates, discrete sites, or the columns of vectors of "
                f"both, got support {p.support} with event_shape {tuple(event_shape)}; use NCE"
            )

    def _columns(self, who: str) -> None:
        """Sorts the columns of a table."""
        shape = self._p.event_shape
        place, parts = torch.arange(shape[0]), segments(self._p.support, shape)
        counted = [part for part in parts if _is_counted(part.constraint)]
        real = [part for part in parts if not _is_counted(part.constraint)]
        self._real = UnconstrainedSpace(real, shape)
        self._counted = torch.cat([place[part.columns] for part in counted])
        order = torch.cat([*(place[part.columns] for part in real), self._counted])
        self._back = order.argsort()
        self.layout = Layout(1, self._real.size, Sites.beside(counted, shape, who))

    def coordinates(self, x: Tensor) -> Tensor:
        """Returns the coordinates of events ``x``, ``rows + event``."""
        if self._measure == "counting":
            return x
        if self._measure == "lebesgue":
            u: Tensor = self._transform.inv(x)
            return u
        return torch.cat([self._real.to_unconstrained(x), x[..., self._counted]], -1)

    def potential(self, u: Tensor) -> Tensor:
        """Returns the potential in nats of events at coordinates ``u``, shape of the rows."""
        if self._measure == "counting":
            return self._p.potential(u)
        if self._measure == "lebesgue":
            x = self._transform(u)
            return self._p.potential(x) - self._transform.log_abs_det_jacobian(u, x)
        num = self.layout.num_real
        real, log_det = self._real.with_log_det(u[..., :num])
        x = torch.cat([real, u[..., num:]], -1)[..., self._back]
        return self._p.potential(x) - log_det
