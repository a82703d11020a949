"""What estimators ask of a distribution before they begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.distributions.known_normalizer import parameters_of, parameters_of_modules
from pyro_ebm.distributions.layers import is_normalized, is_periodic, unvalidated
from pyro_ebm.distributions.supports import same_support
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc import Kernel
from pyro_ebm.normalizers.growth import check_grows
from pyro_ebm.ops.autograd_graph import leaves_of
from pyro_ebm.ops.constraints import base_measure, finite_values, plain
from pyro_ebm.ops.initial_points import initial_points, like_of
from pyro_ebm.ops.rng import rng_preserved

KernelMaker = Callable[[EnergyDistribution], Kernel]

_PERIOD = constraints.interval(-math.pi, math.pi)  # that is drawn from, of a periodic density


def law_of(dist: EnergyDistribution) -> EnergyDistribution:
    """Returns the distribution whose log Z is meant: of a generalized EBM, the one over latents.

    Raises:
        TypeError: If it is not an ``EnergyDistribution``.
    """
    if not isinstance(dist, EnergyDistribution):
        raise TypeError(
            f"log Z is asked of an EnergyDistribution, got {type(dist).__name__}: for a site of a "
            "model use pyro_ebm.unwrap"
        )
    return dist.latent if isinstance(dist, GeneralizedEBM) else dist


def single(dist: EnergyDistribution, estimator: str) -> EnergyDistribution:
    """Returns the law if it is one, not a batch, and its Z is not seen to be infinite.

    Raises:
        ValueError: If it has a batch shape, or its energy one that the law does not name.
        NonFiniteEnergyError: If its density does not fall off far out.
    """
    law = law_of(dist)
    if law.batch_shape != ():
        raise ValueError(
            f"{estimator} estimates one log Z, and batch_shape is {tuple(law.batch_shape)}: "
            "estimate the elements one by one"
        )
    check_dims(law, _point(law))
    check_grows(law)
    return law


def check_dims(law: EnergyDistribution, x: Tensor) -> None:
    """Raises if the energy depends on values whose dims are not those of ``batch_shape``.

    One row tells: of as many rows as there are groups each would be taken for that of its group.
    An energy that fails says so where it is used.

    Args:
        law: The law.
        x: One value of it, ``event_shape``.

    Raises:
        ValueError: If it does.

    Example:
        >>> theta = torch.zeros(2)
        >>> law = EnergyDistribution(lambda x: theta * x, event_shape=())
        >>> check_dims(law, torch.tensor(0.0))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: ...with dims of their own...: give the law batch_shape=(2,)
    """
    row, expected = (1,) * (1 + len(law.batch_shape)), (1, *law.batch_shape)
    try:
        with torch.no_grad():
            shape = tuple(law.energy(x.reshape(row + law.event_shape)).shape)
    except RuntimeError:
        return
    if shape != expected:
        raise ValueError(
            f"{law!r}: the energy depends on values with dims of their own (for one row its shape "
            f"is {shape}, expected {expected}): give the law batch_shape={shape}"
        )


def on_reals(law: EnergyDistribution, estimator: str) -> EnergyDistribution:
    """Returns the law if its support is continuous, so that a kernel can move along coordinates.

    Raises:
        NotImplementedError: If it is not; the sentence says what there is for discrete laws.
    """
    if base_measure(law.support) != "lebesgue":
        raise NotImplementedError(
            f"{estimator} is for continuous supports, and {law!r} lives on {plain(law.support)}: "
            "log Z of a discrete law is a sum over its states (exact), or an estimate by particles "
            "(smc), from draws (bridge), along a ladder (thermodynamic, stepping_stones), or by "
            "annealing with the sweeps of an ExponentialFamily (from_uniform); mcmc.Exchange does "
            "without it"
        )
    return law


def based(dist: EnergyDistribution, estimator: str) -> EnergyDistribution:
    """Returns the law if it is one, on the reals, and has a base to start from.

    Raises:
        NotImplementedError: If its support is not continuous.
        ValueError: If it has no base, or a batch shape.
    """
    law = on_reals(single(dist, estimator), estimator)
    if law.base is None:
        raise ValueError(
            f"{estimator} starts from exact draws of the base, and {dist!r} has none: give base="
        )
    return law


def normalized_on(law: EnergyDistribution, given: Any, name: str) -> Any:
    """Returns what densities are compared with: a distribution that was given, or else the base.

    Args:
        law: The law.
        given: The distribution, ``None`` for the base.
        name: What it is called, the name of its argument.

    Raises:
        ValueError: If there is neither, its shapes are not those of one event, or its own log Z is
            missing.
    """
    q = law.base if given is None else given
    if q is None:
        raise ValueError(f"{law!r} has no base to take for the {name}: give {name}=")
    if q.event_shape != law.event_shape or q.batch_shape != ():
        raise ValueError(
            f"the {name} has batch_shape {tuple(q.batch_shape)} and event_shape "
            f"{tuple(q.event_shape)}, expected () and {tuple(law.event_shape)}"
        )
    if not is_normalized(q):
        raise ValueError(f"the {name} must be a normalized distribution: its own log Z is missing")
    support = _PERIOD if is_periodic(q) else q.support
    if not covers(support, law.support):
        raise ValueError(
            f"the {name} lives on {plain(support)} and the law on {plain(law.support)}: mass "
            f"outside would be missing from log Z. Their supports must be the same, or that of the "
            f"{name} larger"
        )
    return q


def covers(larger: Constraint, support: Constraint) -> bool:
    """Whether a support holds another one, as far as bounds of their coordinates tell.

    Example:
        >>> from torch.distributions import constraints
        >>> covers(constraints.real, constraints.positive)
        True
        >>> covers(constraints.positive, constraints.real)
        False
        >>> covers(constraints.real, constraints.nonnegative_integer)  # another measure
        False
    """
    if same_support(larger, support):
        return True
    larger, support = plain(larger), plain(support)
    if base_measure(larger) != base_measure(support):
        return False
    values = finite_values(support)
    if values is not None and larger.event_dim == 0:
        return bool(larger.check(values).all())
    if not (_has_bounds(larger) and _has_bounds(support)):
        return False
    ends = ((c, name) for name in ("lower_bound", "upper_bound") for c in (larger, support))
    low, own_low, high, own_high = (_bound(c, name) for c, name in ends)
    return bool((low <= own_low).all() and (own_high <= high).all())


def _has_bounds(support: Constraint) -> bool:
    return isinstance(support, type(constraints.real)) or (
        support.event_dim == 0
        and (hasattr(support, "lower_bound") or hasattr(support, "upper_bound"))
    )


def _bound(support: Constraint, name: str) -> Tensor:
    none = -torch.inf if name == "lower_bound" else torch.inf
    return torch.as_tensor(getattr(support, name, none)).detach().cpu()


def within(law: EnergyDistribution, q: Any, x: Tensor, log_weights: Tensor) -> Tensor:
    """Returns log weights with minus infinity where draws of a larger support have left the law's.

    Args:
        law: The law.
        q: What ``x`` was drawn from.
        x: The draws, ``(S,) + event_shape``.
        log_weights: ``(S,)``.
    """
    if law.shares_support_with(q):
        return log_weights
    return torch.where(law.support.check(x), log_weights, -torch.inf)


def check_inside(law: EnergyDistribution, x: Tensor, what: str = "draws") -> Tensor:
    """Returns values of a law if all of them are numbers on its support.

    Of supports whose check has no room for a rounding (a simplex, a ball) the numbers only.

    Args:
        law: The law.
        x: ``lead + event_shape``.
        what: What they are called.

    Raises:
        ValueError: If some are not.
    """
    flat = x.reshape(-1, *law.event_shape)
    bad = flat.isnan().reshape(len(flat), -1).any(1)
    kind = "are NaN"
    if not bool(bad.any()) and plain(law.support).event_dim == 0:
        eps = 4 * torch.finfo(x.dtype).eps if x.is_floating_point() else 0
        bad = ~torch.stack([law.support.check(flat * (1 + s * eps)) for s in (-1, 0, 1)]).any(0)
        kind = f"lie outside of the law's support ({plain(law.support)})"
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {len(flat)} {what} {kind}: leave them out, or correct what they "
            "come from"
        )
    return x


def check_draws(law: EnergyDistribution, draws: Tensor) -> Tensor:
    """Returns draws of a law if they are ``(N,) + event_shape``, and on its support.

    Raises:
        ValueError: If they are not.
    """
    if draws.dim() != 1 + len(law.event_shape) or draws.shape[1:] != law.event_shape:
        raise ValueError(
            f"draws must be (N,) + {tuple(law.event_shape)}, got {tuple(draws.shape)}: join chains "
            "and draws by flatten(0, 1)"
        )
    return check_inside(law, draws)


def shared_law(
    law: EnergyDistribution, like: Tensor, *, with_base: bool = True
) -> EnergyDistribution:
    """Returns the law that all elements of a batch share, as a batch of one, ``(1, ..., 1)``.

    A log Z of it costs what it costs for one element, where that of ``law`` costs it for each.
    Parameters that have the batch's dims all the same broadcast.

    Args:
        law: A law whose batch elements are known to be alike.
        like: A tensor of the dtype and device of values.
        with_base: Whether the base is part of its energy; else it is left out.
    """
    return EnergyDistribution(
        _Shared(law, like, with_base=with_base),
        support=law.support,
        event_shape=law.event_shape,
        batch_shape=(1,) * len(law.batch_shape),
        validate_args=False,
    )


class _Shared(Energy):
    """The energy of a law, base included or not, at values that are not one for each element."""

    def __init__(self, law: EnergyDistribution, like: Tensor, *, with_base: bool) -> None:
        super().__init__()
        self.register_buffer("like", like)
        self.law = law
        self.base = unvalidated(law.base) if with_base and law.base is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns E, or U = E - log base, in nats."""
        with self.law.fixed_weights():
            energy = self.law.energy_function(x)
        return energy if self.base is None else energy - _each_once(self.base, x)


def _each_once(base: Any, x: Tensor) -> Tensor:
    """The log density of values ``lead + event``, ``lead``, each at one of the base's elements."""
    lead = x.shape[: x.dim() - len(base.event_shape)]
    values, number = x.reshape((-1, *base.event_shape)), base.batch_shape.numel()
    whole = -(-len(values) // number) * number  # the last value fills up
    places = torch.arange(whole, device=x.device).clamp_max(len(values) - 1)
    packed = values[places].reshape((-1,) + base.batch_shape + base.event_shape)
    return base.log_prob(packed).flatten()[: len(values)].reshape(lead)


def parameters_at(law: EnergyDistribution, x: Tensor | None = None) -> tuple[Tensor, ...]:
    """Returns the tensors whose change makes an estimate stale.

    Args:
        law: The law.
        x: Values of it, by preference those of the estimate, whose dtype the energy takes; a draw
            of the base, or a point of the support, if not given.
    """
    return parameters_of(law, _point(law) if x is None else x)


def parameters_behind(
    law: EnergyDistribution, value: Tensor, x: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Returns the same for a log Z that keeps its graph: where it has one, nothing is evaluated."""
    if not torch.is_grad_enabled():
        return parameters_at(law, x)
    return tuple({id(t): t for t in (*parameters_of_modules(law), *leaves_of(value))}.values())


def _point(law: EnergyDistribution) -> Tensor:
    with rng_preserved(), torch.no_grad():
        if law.base is not None:
            return law.base.sample()
        like = like_of(law.energy_function)
        lead, event = torch.Size((1, *law.batch_shape)), law.event_shape
        return initial_points(law.support, lead, event, dtype=like.dtype, device=like.device)
