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
from pyro_ebm.ops.graph_recording import is_recording
from pyro_ebm.ops.inheritance import is_own

_LAW = ("forward", "__call__", "statistics", "natural", "set_natural", "coefficients")
_KNOWN = {"log_normalizer": "is_tractable", "sample": "is_sampleable"}
_RTOL, _ATOL = 1e-3, 1e-5  # by which natural parameters may be off, to a transform and back


class ExponentialFamily(Energy):
    """Base class: ``__init__`` sets the arguments named by ``coefficients`` and the support.

    A subclass names its arguments in ``coefficients``, in the order of the statistics, and defines
    ``statistics``. Where every argument is a natural parameter, one number per family, that is all.
    Else, as where an argument is a vector or a scale, it defines :meth:`natural` and beside it
    :meth:`set_natural`, the way back, by which exchange and anchors go from one law of the family
    to another.

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
        >>> class Scale(Precision):
        ...     coefficients = ("scale",)
        ...     def __init__(self, scale):
        ...         ExponentialFamily.__init__(self, (), constraints.real)
        ...         self._set("scale", scale, positive=True)
        ...     def natural(self):
        ...         return self.scale.pow(-2).unsqueeze(-1)
        ...     def set_natural(self, natural):
        ...         self.scale = natural.squeeze(-1).pow(-0.5)
        >>> Scale(2.0).with_natural(torch.tensor([4.0])).scale
        tensor(0.5000)
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
        """Returns the same family at other natural parameters, ``batch + (p,)``.

        Raises:
            ValueError: If :meth:`natural` of the new family is not what was asked for.
        """
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__)
        own = {n: p for n, p in self._parameters.items() if n in self.coefficients}
        new._parameters = {n: p for n, p in self._parameters.items() if n not in own}
        new._buffers = {**self._buffers, **own}
        new._numbers = self._numbers - set(self.coefficients)
        new.set_natural(natural)
        new._check_natural(natural)
        return new

    def set_natural(self, natural: Tensor) -> None:
        """Sets the arguments to those whose :meth:`natural` this is.

        Args:
            natural: Natural parameters, ``batch + (p,)``.

        Raises:
            ValueError: If there are more or fewer of them than arguments.
        """
        if natural.shape[-1] != len(self.coefficients):
            raise ValueError(self._without_way_back())
        for name, value in zip(self.coefficients, natural.unbind(-1), strict=True):
            setattr(self, name, value)

    @torch.no_grad()
    def _check_natural(self, natural: Tensor) -> None:
        """Raises if :meth:`natural` is another than what was set, which no draw would show."""
        kind = type(self)
        pair = kind.natural, kind.set_natural
        if pair == (ExponentialFamily.natural, ExponentialFamily.set_natural):
            return
        found = self.natural()
        if found.shape != natural.shape or (_has_values(found) and _differ(found, natural)):
            raise ValueError(self._without_way_back())

    def _without_way_back(self) -> str:
        return (
            f"with_natural() of {type(self).__name__} does not lead to the natural parameters "
            "asked for: define set_natural(self, natural) beside natural()"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns E(x) in nats."""
        check_event_shape(x, self.event_shape, type(self).__name__)
        statistics = self.statistics(x)
        return -(statistics * self.natural().to(statistics.dtype)).sum(-1)


def _has_values(x: Tensor) -> bool:
    """Whether there are numbers to compare, and not what ``vmap`` or a recording stands for."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(x) and not is_recording()


def _differ(found: Tensor, natural: Tensor) -> bool:
    """Whether they do beyond rounding, wherever both are numbers."""
    close = torch.isclose(found, natural.to(found.dtype), rtol=_RTOL, atol=_ATOL)
    return bool((~close & (found - natural).isfinite()).any())
