r"""The base class of energies and their algebra.

An energy is a callable ``x -> E(x)`` in nats, lower meaning likelier: :math:`p(x) \propto
e^{-E(x)}`. Any callable will do; :class:`Energy` adds a rule for arguments and three operations:

====================  ======================  ==========================================
``e1 + e2``           :class:`SumEnergy`      product of the two unnormalized densities
``beta * e``          :class:`ScaledEnergy`   density to the power ``beta``
``e / temperature``   :class:`ScaledEnergy`   density to the power ``1 / temperature``
====================  ======================  ==========================================

The results know neither their normalizer nor how to sample themselves, even where the operands do.

**Arguments.** An ``nn.Parameter`` is registered as a parameter; any other tensor is kept as it is,
graph included (it may be a latent variable, and a copy would cut it off); a number becomes a buffer
in the default dtype and then follows the dtype of ``x``. Tensors broadcast with the batch dims of
``x`` from the right: a parameter of shape ``(3,)`` meets the rightmost batch dim, ``(P, 1)`` adds a
dim on the left of the result.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_ebm.energies.checks import check_energy_shape

_NUMBER = (float, int, Tensor)


class Energy(nn.Module):
    """Base class: write ``__init__`` with ``self._set(name, value)`` per argument, and ``forward``.

    ``forward`` maps ``x`` of shape ``sample + batch + event`` to energies of shape ``sample +
    batch``, with extra dims from batched parameters on the left. It should read numbers by
    ``self._arg(name, x)`` and must not branch on values, so that it can be vmapped and traced.

    Example:
        >>> class Laplace(Energy):
        ...     def __init__(self, scale: float | Tensor = 1.0) -> None:
        ...         super().__init__()
        ...         self._set("scale", scale, positive=True)
        ...
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return x.abs() / self._arg("scale", x)
        >>> energy = Laplace(2.0) + 0.5 * Laplace()
        >>> energy(torch.tensor([1.0, 4.0]))
        tensor([1., 4.])
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers: frozenset[str] = frozenset()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the energy of ``x`` in nats, one value per event."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward(x)")

    def __add__(self, other: object) -> SumEnergy:
        """Returns the sum of two energies; ``other`` may be any callable."""
        return SumEnergy(self, other) if callable(other) else NotImplemented

    def __radd__(self, other: object) -> SumEnergy:
        """Returns the sum of two energies; ``other`` may be any callable."""
        return SumEnergy(other, self) if callable(other) else NotImplemented

    def __mul__(self, scale: object) -> ScaledEnergy:
        """Returns this energy times an inverse temperature."""
        return ScaledEnergy(self, scale) if isinstance(scale, _NUMBER) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, temperature: object) -> ScaledEnergy:
        """Returns this energy divided by a temperature."""
        if not isinstance(temperature, _NUMBER):
            return NotImplemented
        return ScaledEnergy(self, 1.0 / temperature)

    def _set(self, name: str, value: object, *, positive: bool = False) -> None:
        """Stores an argument by the rule of this module; checks the sign of numbers only."""
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            number = torch.tensor(value, dtype=torch.get_default_dtype())
            if positive and not bool((number > 0).all()):
                raise ValueError(f"{name} must be positive, got {value!r}")
            self.register_buffer(name, number)
            self._numbers |= {name}

    def _arg(self, name: str, x: Tensor) -> Tensor:
        """Returns an argument; one that was given as a number takes the dtype of ``x``."""
        value: Tensor = getattr(self, name)
        follows = name in self._numbers and x.is_floating_point()
        return value.to(x.dtype) if follows else value


class SumEnergy(Energy):
    r"""Sum of energies, :math:`E(x) = \sum_i E_i(x)`: the product of the unnormalized densities.

    Where a term states its ``event_shape``, every term's value is checked to be one value per
    event, since ``(64,) + (64, 1)`` would broadcast to ``(64, 64)`` without a word.

    Args:
        *terms: Energies, modules or plain callables. A plain callable's own parameters are not
            registered. ``nn.Sequential`` has a ``+`` of its own and must stand on the right.

    Raises:
        TypeError: If a term is not callable.
        ValueError: If no term is given, or terms state different event shapes.

    Example:
        >>> from pyro_ebm.energies import GaussianEnergy
        >>> energy = GaussianEnergy() + torch.cos
        >>> energy(torch.zeros(3))
        tensor([1., 1., 1.])
    """

    def __init__(self, *terms: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("SumEnergy needs at least one term, got none")
        flat = [part for term in terms for part in _parts(term)]
        self.terms = nn.ModuleList(_as_module(term) for term in flat)
        self.event_shape = _common_event_shape(flat)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum of the terms at ``x``."""
        return functools.reduce(operator.add, map(functools.partial(self._value, x), self.terms))

    def _value(self, x: Tensor, term: nn.Module) -> Tensor:
        value: Tensor = term(x)
        if self.event_shape is None:
            return value
        name = f"the term {type(term).__name__} of a SumEnergy"
        return check_energy_shape(value, x, len(self.event_shape), name=name, energy=term)


class ScaledEnergy(Energy):
    r"""An energy at another temperature, :math:`E(x) = \beta E_0(x)`.

    Args:
        energy: An energy or any callable.
        scale: The factor :math:`\beta`: a number, or a tensor that broadcasts with the batch dims
            from the right and keeps its graph.

    Raises:
        TypeError: If ``energy`` is not callable.

    Example:
        >>> from pyro_ebm.energies import GaussianEnergy
        >>> beta = torch.tensor([0.5, 2.0])
        >>> (beta * GaussianEnergy())(torch.tensor([2.0, 2.0]))
        tensor([1., 4.])
    """

    scale: Tensor

    def __init__(self, energy: Callable[[Tensor], Tensor], scale: float | Tensor) -> None:
        super().__init__()
        self.energy = _as_module(energy)
        self.event_shape = _common_event_shape([energy])
        self._set("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``scale`` times the energy at ``x``."""
        value: Tensor = self.energy(x)
        return self._arg("scale", value) * value


class _Function(nn.Module):
    """A plain callable among modules."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _as_module(energy: Callable[[Tensor], Tensor]) -> nn.Module:
    if not callable(energy):
        raise TypeError(f"an energy must be callable, got {type(energy).__name__}")
    return energy if isinstance(energy, nn.Module) else _Function(energy)


def _parts(term: Callable[[Tensor], Tensor]) -> list[Callable[[Tensor], Tensor]]:
    return list(term.terms) if isinstance(term, SumEnergy) else [term]


def _common_event_shape(terms: Sequence[Callable[[Tensor], Tensor]]) -> torch.Size | None:
    shapes = (getattr(term, "event_shape", None) for term in terms)
    stated = {torch.Size(shape) for shape in shapes if shape is not None}
    if len(stated) > 1:
        listed = " and ".join(sorted(str(tuple(shape)) for shape in stated))
        raise ValueError(
            f"the terms of a SumEnergy must share one event shape, got {listed}. "
            "For vectors give GaussianEnergy event_dim=1 and DoubleWell or Quartic an event_shape."
        )
    return stated.pop() if stated else None
