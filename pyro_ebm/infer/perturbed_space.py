r"""Where perturbed data live: real coordinates, discrete sites, or tables with columns of both.

Continuous columns are perturbed in unconstrained coordinates :math:`x = T(u)`, in which the
potential is :math:`U(T(u)) - \log|\det J_T(u)|`. Discrete ones keep the numbers they are stored as;
what a site can be is an equally spaced list, each site its own. An event of a table becomes a
vector with its real coordinates first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.ops.constraints import (
    Segment,
    base_measure,
    finite_values,
    integer_bounds,
    plain,
    segments,
)
from pyro_ebm.ops.spaces import UnconstrainedSpace, bijection

__all__ = ["Layout", "PerturbedSpace", "Sites"]


class Sites(NamedTuple):
    """The values of discrete sites: ``lowest + step * k`` for ``k < num``, tensors of event shape.

    Example:
        >>> sites = Sites.of(constraints.integer_interval(1, 3), torch.Size([2]), "A test")
        >>> sites.numbers(torch.tensor([1.0, 3.0]))
        tensor([0, 2])
    """

    lowest: Tensor
    step: Tensor
    num: Tensor

    @classmethod
    def of(cls, support: Constraint, event_shape: torch.Size, who: str) -> Sites:
        """Reads them off a support.

        Raises:
            NotImplementedError: If a site's values are no finite list of numbers.
        """
        if not event_shape:
            return cls(*(part[0] for part in _ladder(support, torch.Size([1]), who)))
        return cls.beside(segments(support, event_shape), event_shape, who)

    @classmethod
    def beside(cls, parts: Sequence[Segment], event_shape: torch.Size, who: str) -> Sites:
        """Joins the sites of some columns of the last event dim."""
        widths = [len(range(event_shape[-1])[part.columns]) for part in parts]
        ladders = [
            _ladder(part.constraint, event_shape[:-1] + (width,), who)
            for part, width in zip(parts, widths, strict=True)
        ]
        return cls(*(torch.cat(pieces, -1) for pieces in zip(*ladders, strict=True)))

    def to(self, device: torch.device) -> Sites:
        """Returns them on a device."""
        return Sites(*(part.to(device) for part in self))

    def numbers(self, x: Tensor) -> Tensor:
        """Returns which of its values every site of ``x`` has, integers shaped as ``x``.

        Raises:
            ValueError: If a site has none of them.
        """
        exact = (x.to(self.lowest.dtype) - self.lowest) / self.step
        if get_proxy_mode() is not None:  # steps that are not replayed look at the values
            return exact.long()
        if not bool(((exact == exact.round()) & (exact >= 0) & (exact < self.num)).all()):
            raise ValueError(
                "the data must lie in the support, but a site holds none of its values; categories "
                "are the integers of integer_interval, and NaN is none. Mask missing rows"
            )
        return exact.long()

    def value(self, numbers: Tensor, like: Tensor) -> Tensor:
        """Returns the values by their numbers, in the dtype of ``like``."""
        return (self.lowest + self.step * numbers).to(like.dtype)


def _ladder(support: Constraint, shape: torch.Size, who: str) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest value, step and number of values of sites of one constraint."""
    values = finite_values(support) if _is_counted(support) else None
    if values is not None and len(values) > 1:
        ladder = values[0], values[1] - values[0], torch.tensor(len(values))
    elif isinstance(plain(support), constraints.integer_interval):
        low, high = (torch.as_tensor(bound) for bound in integer_bounds(support))
        ladder = low.to(torch.get_default_dtype()), torch.ones(()), (high - low + 1).long()
    else:
        ladder = None
    if ladder is None or not all(_broadcasts(part, shape) for part in ladder):
        raise NotImplementedError(
            f"{who} needs sites with a finite list of values each, the same in all rows (boolean, "
            f"spins, integer_interval), got support {support}; give counts an upper bound or use "
            "DiscreteFisher, and store one-hot vectors as categories"
        )
    lowest, step, num = (part.expand(shape) for part in ladder)
    return lowest, step, num


def _broadcasts(part: Tensor, shape: torch.Size) -> bool:
    own = part.shape[::-1]
    return len(own) <= len(shape) and all(n in (1, m) for n, m in zip(own, shape[::-1]))  # noqa: B905


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

    def over_event(self, values: Tensor) -> Tensor:
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
