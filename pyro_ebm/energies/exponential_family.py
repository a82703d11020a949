r"""Energies that are linear in their parameters.

.. math:: E(x) = -\eta \cdot T(x), \qquad \nabla_\eta \log Z = \mathbb E\, T, \qquad
    \nabla^2_\eta \log Z = \operatorname{Cov} T,

so that log Z is convex in the natural parameters :math:`\eta`, and all that data and draws have to
say of them is in the sufficient statistics :math:`T`: whoever compares two parameters, as exchange
and reweighting do, needs the statistics and never the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.closed_form import check_event_shape
from pyro_ebm.ops.inheritance import is_own

_LAW = ("forward", "__call__", "statistics", "natural", "_set_natural", "coefficients")
_KNOWN = {"log_normalizer": "is_tractable", "sample": "is_sampleable"}


class ExponentialFamily(Energy):
    """Base class: ``__init__`` sets the arguments named by ``coefficients`` and the support.

    A subclass names its arguments in ``coefficients``, in the order of the statistics, and defines
    ``statistics``. Where every argument is one number per family they are stacked into the natural
    parameters; an argument that is itself a vector overrides :meth:`natural`.

    Args:
        event_shape: Shape of one event.
        support: Its support.

    Example:
        >>> from torch.distributions import constraints
        >>> class Precision(ExponentialFamily):
        ...     coefficients = ("precision",)
        ...     def __init__(self, precision):
        ...         super().__init__((), constraints.real)
        ...         self._set("precision", precision, positive=True)
        ...     def statistics(self, x):
        ...         return -0.5 * x.square().unsqueeze(-1)
        >>> Precision(2.0)(torch.tensor([1.0, 3.0]))
        tensor([1., 9.])
    """

    coefficients: tuple[str, ...]
    is_tractable = False  # whether log_normalizer() is known
    is_sampleable = False  # whether sample() draws exactly

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass that is another law has not inherited what is known of the one above it."""
        super().__init_subclass__(**kwargs)
        for method, flag in _KNOWN.items():
            if not is_own(cls, method, _LAW) and flag not in vars(cls):
                setattr(cls, flag, False)

    def __init__(self, event_shape: torch.Size | tuple[int, ...], support: Constraint) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.support = support

    def statistics(self, x: Tensor) -> Tensor:
        """Returns T(x), ``(..., p)`` for ``x`` of shape ``(...) + event_shape``."""
        raise NotImplementedError(f"{type(self).__name__} does not define statistics(x)")

    @property
    def has_sweep(self) -> bool:
        """Whether the family has a kernel of its own, and not one inherited by another law."""
        kind = type(self)
        return kind.sweep is not ExponentialFamily.sweep and is_own(kind, "sweep", _LAW)

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of a batch of parameters."""
        return self.natural().shape[:-1]

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats where :attr:`is_tractable`, ``batch_shape``."""
        raise NotImplementedError(f"log Z of {type(self).__name__} is not known")

    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws where :attr:`is_sampleable`, ``shape + batch_shape + event_shape``.

        Args:
            shape: Shape of the sample.
        """
        raise NotImplementedError(f"{type(self).__name__} has no exact sampler for {shape}")

    def sweep(self, x: Tensor, num_sweeps: int) -> Tensor:
        """Returns x after sweeps of a reversible kernel that keeps the law.

        Args:
            x: Events, ``batch_shape + event_shape``.
            num_sweeps: Sweeps.
        """
        raise NotImplementedError(f"{type(self).__name__} has no kernel of its own")

    def natural(self) -> Tensor:
        """Returns the natural parameters, ``batch + (p,)``, with the graph of the arguments."""
        values = [getattr(self, name) for name in self.coefficients]
        return torch.stack(torch.broadcast_tensors(*values), -1)

    def with_natural(self, natural: Tensor) -> ExponentialFamily:
        """Returns the same family at other natural parameters, ``batch + (p,)``."""
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__)
        others = {n: p for n, p in self._parameters.items() if n not in self.coefficients}
        new._parameters, new._buffers = others, dict(self._buffers)
        new._set_natural(natural)
        return new

    def _set_natural(self, natural: Tensor) -> None:
        """Puts natural parameters where :meth:`natural` finds them."""
        for name, value in zip(self.coefficients, natural.unbind(-1), strict=True):
            self._buffers[name] = value
        self._numbers = self._numbers - set(self.coefficients)

    def forward(self, x: Tensor) -> Tensor:
        """Returns E(x) in nats."""
        check_event_shape(x, self.event_shape, type(self).__name__)
        statistics = self.statistics(x)
        return -(statistics * self.natural().to(statistics.dtype)).sum(-1)
