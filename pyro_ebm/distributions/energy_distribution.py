r"""An energy as a Pyro distribution that knows what is known of its normalizer.

.. math:: p(x) = e^{-E(x)}\, \mathrm{base}(x) / Z, \qquad Z = \int e^{-E}\, d\mathrm{base}

Without a base the measure is the support's own: Lebesgue, counting, or the surface of a sphere.
``energy(x)`` is :math:`E`, ``potential(x)`` is :math:`U = E - \log \mathrm{base}`;
``unnormalized_log_prob = -U`` is what samplers, objectives and normalizers use. ``log_prob = -U -
\log Z`` is for Pyro: where log Z is missing it is defined up to a constant, which is harmless over
:math:`x` and wrong over anything the energy depends on; that second use is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import pyro.poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.distributions import (
    default_sample,
    guard_schedule,
    known_normalizer,
    normalizer_guard,
    supports,
)
from pyro_ebm.distributions.call_stack import caller_weighing_components
from pyro_ebm.distributions.known_normalizer import LogNormalizerLike
from pyro_ebm.distributions.random_weights import FixedWeights, draw_weights
from pyro_ebm.energies.base import ScaledEnergy, SumEnergy
from pyro_ebm.energies.checks import energy_at
from pyro_ebm.energies.exponential_family import ExponentialFamily
from pyro_ebm.ops.autograd import grad_of
from pyro_ebm.ops.constraints import base_measure, finite_values
from pyro_ebm.ops.inheritance import is_own
from pyro_ebm.typing import BaseMeasure, EnergyFn, is_exact_sampler, is_tractable

Sampler = Callable[["EnergyDistribution", torch.Size], Tensor]

_ENERGY = ("forward", "__call__")  # a subclass that changes it has inherited what is of another


class EnergyDistribution(TorchDistribution):
    r"""The law with density :math:`\propto e^{-E(x)}` relative to a base or a support's measure.

    The distribution is a cheap view: it owns no weights. Random weights (``PyroSample`` attributes)
    are drawn where the distribution is made. Register a network with ``pyro.module`` (or use a
    ``PyroModule``), or freeze it.

    Args:
        energy: ``x -> E(x)`` in nats; ``x`` has shape ``sample + batch + event`` and the result
            ``sample + batch``, with extra dims (particles, enumeration) on the left only.
        base: A normalized distribution. It fixes shapes and support.
        event_shape: Shape of one event, where there is no base.
        support: Support, where there is no base; real numbers if only ``event_shape`` is given.
        batch_shape: Batch shape, where there is no base.
        log_normalizer: What is known of log Z in nats: a constant, a tensor, a
            :class:`LogNormalizer`, or a function without arguments. A function is taken at its word
            to hold for every parameter of the energy; anything else holds for the parameters that
            its own graph contains.
        sampler: ``(distribution, sample_shape) -> draws``, used by :meth:`sample`. Its draws count
            as approximate unless it has an attribute ``draws_are_exact`` that is true.
        conditional: Whether the energy depends on row-wise values other than ``x``; ``None`` lets
            objectives test.
        validate_args: As everywhere in torch.

    Raises:
        ValueError: If neither base, support nor event shape is given, or they contradict each
            other.
        TypeError: If the energy is not callable, the base is not a distribution, or another
            argument is of a wrong kind.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> tilted = EnergyDistribution(lambda x: 0.5 * x**2, base=dist.Normal(0.0, 1.0))
        >>> tilted.potential(torch.tensor(2.0)) - tilted.potential(torch.tensor(0.0))
        tensor(4.)
        >>> tilted.is_normalized
        False
    """

    arg_constraints: dict[str, Constraint] = {}
    has_rsample = False
    _log_normalizer: LogNormalizerLike | None

    def __init__(
        self,
        energy: EnergyFn,
        base: TorchDistribution | None = None,
        *,
        event_shape: torch.Size | tuple[int, ...] | None = None,
        support: Constraint | None = None,
        batch_shape: torch.Size | tuple[int, ...] = (),
        log_normalizer: LogNormalizerLike | None = None,
        sampler: Sampler | None = None,
        conditional: bool | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _check_callable(energy)
        self._energy = energy
        self.base = base
        self.sampler = sampler
        self._sampler_is_exact = bool(getattr(sampler, "draws_are_exact", False))
        self.conditional = conditional
        self._log_normalizer = known_normalizer.checked(log_normalizer)
        self._weights = draw_weights(energy, getattr(base, "generator", None))
        self._support, event = supports.resolve(energy, base, support, event_shape)
        self._is_exact = base is None and _is_exact(energy, self._support, event)
        self._draws_exactly = base is None and _draws_exactly(energy, self._support, event)
        batch = supports.size_of("batch_shape", batch_shape)
        if base is not None:
            batch = supports.broadcast_batch(base.batch_shape, batch, "base")
            self.base = base if batch == base.batch_shape else base.expand(batch)
        elif self._is_exact or isinstance(energy, ExponentialFamily):
            batch = supports.broadcast_batch(default_sample.own_batch(energy), batch, "energy")
        super().__init__(batch, event, validate_args=validate_args)

    # --- what the distribution is

    @property
    def energy_function(self) -> EnergyFn:
        """The energy itself, as it was given."""
        return self._energy

    @property
    def support(self) -> Constraint:
        """The support, with the base's or the given constraint."""
        return self._support

    @property
    def base_measure(self) -> BaseMeasure:
        """The measure that densities refer to."""
        return base_measure(self._support)

    def shares_support_with(self, other: Any) -> bool:
        """Whether another distribution lives on the same set."""
        return supports.same_support(self._support, other.support)

    @property
    def is_exact_energy(self) -> bool:
        """Whether the energy itself knows log Z and samples, on this support and with no base."""
        return self._is_exact

    @property
    def is_normalized(self) -> bool:
        """Whether log Z is known and was not made at other parameters than today's."""
        return known_normalizer.problem_with(self.log_normalizer) is None

    @property
    def log_normalizer(self) -> LogNormalizerLike | None:
        """What was given as log Z, or the energy's own method; ``None`` where it is unknown."""
        if self._log_normalizer is not None:
            return self._log_normalizer
        return self._energy.log_normalizer if self.is_exact_energy else None  # type: ignore[attr-defined]

    def log_normalizer_value(self) -> Tensor | None:
        """Log Z in nats, broadcasting with ``batch_shape``; ``None`` if unknown or stale."""
        with self.fixed_weights():
            return known_normalizer.value_of(self.log_normalizer)

    # --- densities

    def energy(self, x: Tensor) -> Tensor:
        """Returns E(x) in nats, shape ``sample + batch`` (extra dims on the left)."""
        return self._energy_of(self.broadcast_value(x))

    def potential(self, x: Tensor) -> Tensor:
        """Returns U(x) = E(x) - log base(x) in nats."""
        return -self.unnormalized_log_prob(x)

    def score(self, x: Tensor) -> Tensor:
        """Returns the score, minus the gradient of the potential in nats per unit.

        Differentiable (in parameters and in ``x``) where grad mode is on.

        Returns:
            Shape ``sample + batch + event``, with the extra dims of batched parameters on the left.
        """
        x = self.broadcast_value(x)
        log_p, score = self._value_and_score(x)
        if log_p.shape + self.event_shape == x.shape:
            return score
        return self._value_and_score(x.expand(log_p.shape + self.event_shape))[1]

    def _value_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return grad_of(self.unnormalized_log_prob, x)
        x = x.clone() if x.is_inference() else x
        at = x if x.requires_grad else x.detach().requires_grad_()
        log_p = self.unnormalized_log_prob(at)
        return log_p, torch.autograd.grad(log_p.sum(), at, create_graph=True)[0]

    def unnormalized_log_prob(self, x: Tensor) -> Tensor:
        """Returns -U(x) in nats: the log density up to log Z. Never checked, never hooked."""
        return self._unnormalized(self.broadcast_value(x))

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns -U(x) - log Z, the last term only where it is known.

        Raises:
            MissingNormalizerError: In the backward pass, if a value other than ``x`` receives
                gradient that log Z does not account for; at once, if this is a component of a
                mixture and log Z is unknown.
        """
        if self._validate_args:
            self._validate_sample(x)
        x = self.broadcast_value(x)
        with known_normalizer.served_by(self._log_normalizer) as functions:
            log_z = self.log_normalizer_value()
        if log_z is None and (mixture := caller_weighing_components()) is not None:
            normalizer_guard.report_mixture(mixture)
        turn = guard_schedule.turn_of(self._energy, self.base, x, log_z)
        if turn is not None:
            x = x.view_as(x)
            state = known_normalizer.problem_with(self.log_normalizer)
            log_p, log_z = normalizer_guard.watch(
                self._unnormalized(x),
                x,
                log_z,
                covers=state is None and callable(self.log_normalizer),
                energy=self._energy,
                why=state or "log Z was given as a constant",
                bounds=supports.tensors_in(self._support),
                done=turn,
                function=self._log_normalizer if callable(self._log_normalizer) else None,
                again=self.log_normalizer_value,
            )
        else:
            log_p = self._unnormalized(x)
        if log_z is None:
            return log_p
        known_normalizer.tell_rows(self._log_normalizer, functions, log_p, log_z)
        return known_normalizer.subtract(log_p, log_z, self._log_normalizer)

    def _energy_of(self, x: Tensor) -> Tensor:
        with self.fixed_weights():
            return energy_at(self._energy, x, len(self.event_shape))

    def fixed_weights(self) -> FixedWeights:
        """Returns the handler under which random weights keep the values they were made with."""
        return FixedWeights(self._weights)

    def _unnormalized(self, x: Tensor) -> Tensor:
        energy = self._energy_of(x)
        return -energy if self.base is None else self.base.log_prob(x) - energy

    def broadcast_value(self, x: Tensor) -> Tensor:
        """Returns ``x`` expanded so that its leading dims contain ``batch_shape``.

        Raises:
            ValueError: If ``x`` does not end in the event shape.
        """
        lead = x.dim() - len(self.event_shape)
        if x.shape[max(lead, 0) :] != self.event_shape:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not end in the event shape "
                f"{tuple(self.event_shape)}"
            )
        rows, batch = x.shape[:lead], self.batch_shape
        if len(rows) >= len(batch) and rows[len(rows) - len(batch) :] == batch:
            return x  # the usual case, at every call of an energy
        need = torch.broadcast_shapes(rows, batch)
        return x if rows == need else x.expand(need + self.event_shape)

    # --- sampling

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws: exactly where the energy can, else by ``sampler``, else by a short chain.

        The chain starts from the base.

        Returns:
            Detached draws of shape ``sample_shape + batch_shape + event_shape``.

        Warns:
            ApproximateSampleWarning: If the short chain had not converged (rank R-hat above 1.2).
        """
        shape = torch.Size(sample_shape)
        with pyro.poutine.block():
            if self.sampler is not None:
                return self.sampler(self, shape)
            if self._draws_exactly:
                return default_sample.draw_exactly(self, shape)
            return default_sample.draw(self, shape)

    @property
    def has_exact_sample(self) -> bool:
        """Whether :meth:`sample` draws from the distribution itself: the one word on that.

        The energy can, or the sampler says that it does by ``draws_are_exact``, which holds for the
        distribution that it was given to: one with another energy draws by it approximately.
        """
        return self._draws_exactly if self.sampler is None else self._sampler_is_exact

    @property
    def energy_draws_exactly(self) -> bool:
        """Whether the energy's own ``sample`` draws from this distribution, sampler or not."""
        return self._draws_exactly

    @property
    def energy_sweeps(self) -> bool:
        """Whether the energy's own ``sweep`` keeps this distribution."""
        moves = self.base is None and getattr(self._energy, "has_sweep", False)
        return moves and _lives_on(self._energy, self._support, self.event_shape)

    @property
    def has_enumerate_support(self) -> bool:
        """Whether Pyro may enumerate: a scalar with finitely many values and a known log Z."""
        return (
            not self.event_shape and self.is_normalized and finite_values(self._support) is not None
        )

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002
        """Returns all values, shape ``(K,) + batch_shape``, typed as the base's."""
        if not self.has_enumerate_support:
            raise NotImplementedError(
                "enumerate_support needs a scalar event with finitely many values and a known log Z"
            )
        if self.base is not None and self.base.has_enumerate_support:
            return self.base.enumerate_support(expand=expand)
        values = finite_values(self._support).reshape((-1,) + (1,) * len(self.batch_shape))  # type: ignore[union-attr]
        return values.expand((-1,) + self.batch_shape) if expand else values

    # --- new distributions from this one

    def expand(
        self, batch_shape: torch.Size | tuple[int, ...], _instance: EnergyDistribution | None = None
    ) -> EnergyDistribution:
        """Returns the same kind of distribution with a larger batch shape; plates call this.

        Raises:
            ValueError: If the present batch shape does not broadcast to ``batch_shape``.
        """
        new = self._copy()
        new._batch_shape = supports.size_of("batch_shape", batch_shape)
        if (
            supports.broadcast_batch(self.batch_shape, batch_shape, "distribution")
            != new._batch_shape
        ):
            raise ValueError(
                f"cannot expand batch_shape {tuple(self.batch_shape)} to {tuple(new._batch_shape)}"
            )
        if self.base is not None:
            new.base = self.base.expand(new._batch_shape)
        return new

    def tilt(self, energy: EnergyFn) -> EnergyDistribution:
        """Returns the law with energy E + ``energy`` on the same base; log Z becomes unknown."""
        return self._with_energy(SumEnergy(self._energy, energy), energy)

    def temper(self, inverse_temperature: float | Tensor) -> EnergyDistribution:
        """Returns the law with energy beta E on the same base.

        Log Z stays known at beta 0 (with a base) and at beta 1 only.
        """
        if isinstance(inverse_temperature, Number) and inverse_temperature == 1:
            return self._copy()
        new = self._with_energy(ScaledEnergy(self._energy, inverse_temperature))
        if (
            isinstance(inverse_temperature, Number)
            and inverse_temperature == 0
            and self.base is not None
        ):
            new._log_normalizer = 0.0
        return new

    def as_base(self, energy: EnergyFn) -> EnergyDistribution:
        """Returns the law with this normalized distribution as base and ``energy`` on top of it."""
        if not self.is_normalized:
            raise ValueError(
                "as_base needs a normalized distribution: give log_normalizer=, or use "
                "tilt(energy), which keeps this distribution's own base"
            )
        return EnergyDistribution(energy, base=self)

    def with_log_normalizer(self, log_normalizer: LogNormalizerLike | None) -> EnergyDistribution:
        """Returns the same law with this knowledge of log Z; the class says what may be given."""
        new = self._copy()
        new._log_normalizer = known_normalizer.checked(log_normalizer)
        return new

    def _with_energy(self, energy: EnergyFn, *added: EnergyFn) -> EnergyDistribution:
        new = self._copy()
        new._energy = energy
        new._weights = self._weights | draw_weights(*added)
        new._log_normalizer = None
        new._is_exact = new._draws_exactly = new._sampler_is_exact = False
        return new

    def _copy(self) -> EnergyDistribution:
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__)
        return new

    # --- moments that need a sampler

    @property
    def mean(self) -> Tensor:
        """Not available in closed form."""
        raise NotImplementedError(_no_moment("mean", "draws.mean(0)"))

    @property
    def variance(self) -> Tensor:
        """Not available in closed form."""
        raise NotImplementedError(_no_moment("variance", "draws.var(0)"))

    def entropy(self) -> Tensor:
        """Not available in closed form."""
        raise NotImplementedError(_no_moment("entropy", "d.potential(draws).mean(0) + log Z"))

    def __repr__(self) -> str:
        name = getattr(self._energy, "__name__", type(self._energy).__name__)
        known = "log Z known" if self.is_normalized else "log Z unknown"
        return (
            f"{type(self).__name__}({name}, batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, {known})"
        )


def _no_moment(name: str, recipe: str) -> str:
    return (
        f"an EnergyDistribution has no closed-form {name}; estimate it from draws of MCMC or of "
        f"d.sample((1000,)), for example {recipe}"
    )


def _check_callable(energy: Any) -> None:
    if isinstance(energy, type):
        raise TypeError(f"energy must be an object, x -> E(x), got the class {energy.__name__}")
    if not callable(energy):
        raise TypeError(f"energy must be callable, x -> E(x), got {type(energy).__name__}")


def _is_exact(energy: EnergyFn, support: Constraint, event_shape: torch.Size) -> bool:
    """Whether the energy knows its log Z *on this support*, not only on its own."""
    return (
        is_tractable(energy)
        and getattr(energy, "is_tractable", True)
        and is_own(type(energy), "log_normalizer", _ENERGY)
        and _lives_on(energy, support, event_shape)
    )


def _draws_exactly(energy: EnergyFn, support: Constraint, event_shape: torch.Size) -> bool:
    if is_exact_sampler(energy):
        able = energy.is_sampleable
    else:
        able = _is_exact(energy, support, event_shape)
    return (
        able and is_own(type(energy), "sample", _ENERGY) and _lives_on(energy, support, event_shape)
    )


def _lives_on(energy: Any, support: Constraint, event_shape: torch.Size) -> bool:
    return energy.event_shape == event_shape and supports.same_support(energy.support, support)
