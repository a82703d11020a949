"""What a kernel is: configuration bound to a target, a state, and a step for all chains at once.

``step`` takes a :class:`State` and returns the next one with an :data:`Info`. The state holds all
that the next step needs, with what adaptation has set, and nothing that cannot be saved; the info
holds what diagnostics need, under ArviZ's names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.mcmc.targets.first_point import first_chain
from pyro_ebm.mcmc.targets.model_target import ModelTarget, Potential, target_of_model
from pyro_ebm.mcmc.targets.target import Target
from pyro_ebm.ops.arguments import positive

Info = dict[str, Tensor]
"""Statistic to one value per chain, shape ``(C,)``."""

MAX_ENERGY_ERROR = 1000.0
"""Nats above which a trajectory counts as divergent."""

_MAX_TRIES = 100


@dataclass(frozen=True)
class State:
    """What the next step needs.

    Args:
        position: Unconstrained positions, ``(C, D)``.
        potential: U there in nats, ``(C,)``.
        gradient: Its gradient, ``(C, D)``; of a kernel without gradients, empty.
        tuning: What adaptation sets: ``step_size``, ``root`` (of the metric) and the like.
        extra: What a kernel keeps besides, such as momenta.
        rng: State of torch's CPU generator when this state was reached, if it was noted.
        kernel: The :attr:`Kernel.kind` that was tuned.
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor
    tuning: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    rng: Tensor | None = None
    kernel: str = ""

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the state, to go on from it in another process."""
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> State:
        """Reads what :meth:`save` wrote."""
        return cls(**torch.load(path, weights_only=True))

    def restore_rng(self) -> None:
        """Sets torch's CPU generator to where it stood: a run on the CPU goes on bit for bit.

        Raises:
            ValueError: If the state was taken in the middle of a run.
        """
        if self.rng is None:
            raise ValueError("this state was taken before its run ended: it notes no generator")
        torch.set_rng_state(self.rng)

    def with_tuning(self, **values: Tensor) -> State:
        """Returns a state tuned anew."""
        return replace(self, tuning={**self.tuning, **values})


class Kernel(ABC):
    r"""Base of kernels that move a batch of chains.

    A subclass defines :meth:`step`; :attr:`adjusted` says whether it keeps its target exactly.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        potential_fn: Instead of it, a potential in nats of named unconstrained values of one chain;
            ``initial_params`` of the run then gives their shapes.
        inverse_temperature: :math:`\beta`, multiplied into the energy of a distribution and never
            into its base; other than 1, the draws are not the distribution's and are marked so.

    Raises:
        TypeError: If there is not one of target and ``potential_fn``, the target is nothing that
            can be sampled, or what is tempered is no distribution.
    """

    adjusted = True
    bias = "its draws are biased by the step size"  # of a kernel that is not adjusted, in words
    needs_gradient = True
    knows_potential = True  # whether U of a state is that of its position
    goes_on_from_position = True  # whether a chain may be taken up at its position alone
    adapt_step_size = False
    adapt_mass_matrix = False
    metric = "diagonal"
    target_accept_prob = 0.0
    largest_step_size = float("inf")
    step_size: float | None = None

    def __init__(
        self,
        target: Any = None,
        *,
        potential_fn: Potential | None = None,
        inverse_temperature: float = 1.0,
    ) -> None:
        if (target is None) == (potential_fn is None):
            raise TypeError(
                f"{type(self).__name__} needs a target (a Pyro model, an EnergyDistribution) or "
                "potential_fn=, and not both"
            )
        if (
            target is not None
            and not callable(target)
            and not isinstance(target, EnergyDistribution)
        ):
            raise TypeError(
                f"{type(self).__name__}: the target must be a Pyro model, an EnergyDistribution or "
                f"a GeneralizedEBM, got {type(target).__name__}"
            )
        self.given = target
        self.potential_fn = potential_fn
        self.inverse_temperature = positive("inverse_temperature", inverse_temperature)
        if inverse_temperature != 1 and not isinstance(target, EnergyDistribution):
            raise TypeError(
                f"{type(self).__name__}: inverse_temperature multiplies the energy of a "
                "distribution; scale the factors of a Pyro model by poutine.scale"
            )

    # --- binding

    def bind(self, *args: Any, initial_params: Any = None, **kwargs: Any) -> Target:
        """Returns the target with its arguments.

        Args:
            *args: Arguments of the model.
            initial_params: The run's starting values, which say what a ``potential_fn`` takes and
                where a model is first run.
            **kwargs: Keyword arguments of the model.

        Raises:
            TypeError: If a distribution is given arguments.
            ValueError: If nothing says what a ``potential_fn`` takes.
        """
        if self.potential_fn is not None:
            return ModelTarget(self.potential_fn, self._shapes_of(initial_params))
        if isinstance(self.given, EnergyDistribution):
            if args or kwargs:
                raise TypeError(
                    f"{type(self).__name__} samples {self.given!r}, which takes no arguments"
                )
            return DistributionTarget(self.given.temper(self.inverse_temperature))
        return target_of_model(self.given, args, kwargs, initial_params=initial_params)

    def _shapes_of(self, initial_params: Any) -> dict[str, Tensor]:
        """One value per name, of this run or of the one before."""
        if initial_params:
            first = first_chain(initial_params)  # the driver says what is wrong with others
            self._like = {name: first.get(name, torch.zeros(())) for name in initial_params}
        if not hasattr(self, "_like"):
            raise ValueError("potential_fn= needs initial_params=, one value per name and chain")
        return self._like

    @property
    def kind(self) -> str:
        """The name of the kernel whose tuning this one's is: its own, or that of our base of it."""
        ours = __name__.partition(".")[0]
        return next(
            k.__name__ for k in type(self).__mro__ if k.__module__.partition(".")[0] == ours
        )

    # --- the chain

    def refreshed(self, potential: CapturedPotential, state: State) -> State:
        """Returns a state of another run with U and gradient of this one's target.

        Where they are the same already the state is left as it is, to the last bit.
        """
        u, gradient = self.evaluate(potential, state.position)
        if torch.equal(u, state.potential) and torch.equal(gradient, state.gradient):
            return state
        return replace(state, potential=u, gradient=gradient)

    def init(self, potential: CapturedPotential, q: Tensor) -> State:
        """Returns the first state at positions ``(C, D)``."""
        u, gradient = self.evaluate(potential, q)
        return State(q, u, gradient, self.first_tuning(q), kernel=self.kind)

    @abstractmethod
    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Returns the next state and its statistics, ``(C,)`` each.

        A kernel whose step size is adapted reports ``acceptance_rate``, one with a gradient
        ``diverging``; other names are free.
        """

    def warm_step(
        self,
        potential: CapturedPotential,
        state: State,
        *,
        metric_is_final: bool,
    ) -> tuple[State, Info]:
        """Returns the next state of the warm-up, with what only this kernel tunes tuned.

        Args:
            potential: U and its gradient.
            state: Where the chains are.
            metric_is_final: Whether the metric will not change any more.
        """
        return self.step(potential, state)

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns the tuning to start with."""
        return {}

    def doubts(self, stats: Mapping[str, Tensor]) -> list[str]:
        """Returns what a run's statistics, ``(C, draws)`` each, leave in doubt, in sentences."""
        return []

    def find_step_size(self, potential: CapturedPotential, state: State) -> State:
        """Returns the state with a step size of the right order, where the kernel can find one."""
        return state

    def evaluate(self, potential: CapturedPotential, q: Tensor) -> tuple[Tensor, Tensor]:
        """Returns U and, for kernels that use it, its gradient."""
        if self.needs_gradient:
            return potential(q)
        return potential.value(q), q.new_empty(q.shape[0], 0)


def chosen(which: Tensor, new: State, old: State) -> State:
    """Returns the new state for the chains of ``which`` and the old one for the rest.

    Args:
        which: Chains, ``(C,)``.
        new: A state of all of them.
        old: Another one, whose tuning and generator are kept.
    """
    rows = which[:, None].expand_as(old.position).contiguous()  # used twice
    return replace(
        old,
        position=torch.where(rows, new.position, old.position),
        potential=torch.where(which, new.potential, old.potential),
        gradient=torch.where(rows[:, : old.gradient.shape[1]], new.gradient, old.gradient),
        extra={name: _where(which, new.extra[name], value) for name, value in old.extra.items()},
    )


def _where(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(which.reshape(which.shape + (1,) * (new.dim() - 1)), new, old)


def check_untempered(kernel: Kernel, user: str) -> None:
    """Raises where draws at another temperature would be taken for the law's own.

    Raises:
        ValueError: If the kernel has an inverse temperature other than 1.
    """
    if kernel.inverse_temperature != 1:
        raise ValueError(
            f"{user} draws from the law itself, and the kernel has inverse_temperature "
            f"{kernel.inverse_temperature:g}: give it dist.temper(beta)"
        )


def ran_off(state: State) -> Tensor:
    """Returns which chains are where U is not finite, ``(C,)``: no accept step holds them back."""
    return ~torch.isfinite(state.potential)


def finite_start(target: Target, value: Callable[[Tensor], Tensor], num_chains: int) -> Tensor:
    """Returns starting positions ``(C, D)`` of finite potential.

    Args:
        target: What is to be sampled.
        value: Its potential at positions ``(C, D)``, ``(C,)``.
        num_chains: C.

    Raises:
        NonFiniteEnergyError: If some chain finds none in a hundred tries.
    """
    q = target.draw_start(num_chains)
    for _ in range(_MAX_TRIES):
        bad = ~torch.isfinite(value(q))
        if not bool(bad.any()):
            return q
        q = torch.where(bad[:, None], target.draw_start(num_chains), q)
    raise NonFiniteEnergyError(
        f"{target!r}: no starting point of finite potential was found for {int(bad.sum())} of "
        f"{num_chains} chains in {_MAX_TRIES} tries. Give initial_params=, or look for NaN in the "
        "model"
    )
