r"""Exchange along directions between chains: parallel adaptive direction sampling.

The chains are two halves. A chain of one half jumps along the difference of two chains a and b of
the other,

.. math:: q' = q + \tfrac{\epsilon}{\sqrt 2} (q_a - q_b) + \epsilon\, \nu R\, \xi, \qquad
    \xi \sim N(0, I),

and is accepted as by :class:`~pyro_ebm.mcmc.Exchange`; then the other half moves by what the first
has become. Given the half that rests, a jump is as likely as its reverse, for (a, b) is as likely
as (b, a): every half-step keeps the product of all chains' posteriors. (Jumps of all chains at once
by each other's old positions would not.) Differences have twice the covariance of the posterior and
its shape, with no metric to be learned. The noise reaches where no difference points.

Chains of a run are not independent over time, though at any one time they are in the limit.

References:
    ter Braak, A Markov chain Monte Carlo version of the genetic algorithm differential evolution,
    Statistics and Computing 16, 2006; Caimo, Friel, Bayesian inference for exponential random graph
    models, Social Networks 33, 2011; Foreman-Mackey, Hogg, Lang, Goodman, emcee: the MCMC hammer,
    PASP 125, 2013 (two halves).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.exchange.exchange_kernel import ExchangeKernel
from pyro_ebm.mcmc.exchange.exchange_target import ExchangeTarget
from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.metric import stretched
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import positive

__all__ = ["DirectionExchange"]

NOISE = 0.05  # of a jump, beside one along a difference


class DirectionExchange(ExchangeKernel):
    """Exchange by jumps along differences between chains.

    Args:
        model: As of :class:`Exchange`.
        noise: The share of a jump that is noise of the metric's shape.
        **options: Those of :class:`Exchange`; ``step_size`` is in standard deviations of the
            posterior.

    Raises:
        ValueError: When run, with fewer than twice D + 2 chains for D coordinates, of which a half
            would not span the space, or with data for each chain.

    Example:
        >>> DirectionExchange(lambda: None, noise=0.1).noise
        0.1
    """

    couples_chains = True

    def __init__(self, model: Any = None, *, noise: float = NOISE, **options: Any) -> None:
        super().__init__(model, **options)
        self.noise = positive("noise", noise)

    def bind(self, *args: Any, initial_params: Any = None, **kwargs: Any) -> ExchangeTarget:
        """Returns the model as a target without its missing log Z's.

        Raises:
            ValueError: If every chain has data of its own.
        """
        target = super().bind(*args, initial_params=initial_params, **kwargs)
        check_one_posterior(target)
        return target

    def init(self, potential: CapturedPotential, q: Tensor) -> State:
        """Returns the first state, with the natural parameters there.

        Raises:
            ValueError: If there are too few chains.
        """
        check_spanning(q)
        return super().init(potential, q)

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves one half of the chains, and then the other by where the first has come."""
        return moved_by_halves(self, potential, state, self.jumps)

    def jumps(self, state: State, resting: Tensor) -> Tensor:
        """Returns a jump for every chain of a half, by the positions of the other, ``(C', D)``."""
        return jumps_along(state, resting, state.tuning["step_size"], noise=self.noise)


def moved_by_halves(
    kernel: ExchangeKernel,
    potential: CapturedPotential,
    state: State,
    jumps: Callable[[State, Tensor], Tensor],
) -> tuple[State, Info]:
    """Returns the state after both halves of the chains have moved, and what diagnostics need.

    Args:
        kernel: What accepts.
        potential: The target.
        state: All chains.
        jumps: The state of a half and the positions of the other to a jump for each of its chains,
            ``(C', D)``, as likely as its opposite.
    """
    half = len(state.position) // 2

    def moved(part: State, resting: State) -> tuple[State, Info]:
        to = kernel.at(potential, part, part.position + jumps(part, resting.position))
        return kernel.decided(potential, part, to)

    first, second = _part(state, slice(half)), _part(state, slice(half, None))
    first, one = moved(first, second)
    second, other = moved(second, first)
    return _joined(state, (first, second)), {n: torch.cat([one[n], other[n]]) for n in one}


def jumps_along(
    state: State, resting: Tensor, length: float | Tensor, *, noise: float = NOISE
) -> Tensor:
    """Returns jumps of the chains along differences of others, ``(C', D)``.

    Args:
        state: The chains, with their metric.
        resting: Positions of the others.
        length: Of a jump, in standard deviations of the posterior.
        noise: The share of a jump that is noise of the metric's shape.
    """
    around = stretched(torch.randn_like(state.position), state.tuning["root"])
    along = _differences(resting, len(state.position)) / math.sqrt(2.0)
    return length * (along + noise * around)


def check_one_posterior(target: ExchangeTarget) -> None:
    """Raises ``ValueError`` if every chain has data of its own."""
    if target.each is not None:
        raise ValueError(
            "jumps along differences of chains need chains of one posterior, got data for each "
            "chain: use Exchange"
        )


def check_spanning(q: Tensor) -> None:
    """Raises ``ValueError`` if a half of the positions ``(C, D)`` does not span the space."""
    num_chains, dim = q.shape
    if num_chains < 2 * (dim + 2):
        raise ValueError(
            f"jumps along differences of chains need at least {2 * (dim + 2)} chains for {dim} "
            f"unconstrained coordinates, got num_chains = {num_chains}: use more, or Exchange"
        )


def _differences(points: Tensor, number: int) -> Tensor:
    """Differences of two different points each, ``(number, D)``."""
    num = len(points)
    a = torch.randint(num, (number,), device=points.device)
    b = (a + torch.randint(1, num, (number,), device=points.device)) % num
    return points[a] - points[b]


def _part(state: State, rows: slice) -> State:
    """The state of some of the chains."""
    step_size = state.tuning["step_size"]
    return replace(
        state,
        position=state.position[rows],
        potential=state.potential[rows],
        gradient=state.gradient[rows],
        tuning={**state.tuning, "step_size": step_size[rows] if step_size.dim() else step_size},
        extra={name: value[rows] for name, value in state.extra.items()},
    )


def _joined(state: State, parts: Sequence[State]) -> State:
    """The state of all chains, with its tuning."""
    return replace(
        state,
        position=torch.cat([part.position for part in parts]),
        potential=torch.cat([part.potential for part in parts]),
        extra={name: torch.cat([part.extra[name] for part in parts]) for name in state.extra},
    )
