r"""The small sampler behind ``sample()``: many short chains, one batch, no tuning by hand.

The support decides the kernel of each block of columns: MALA on the unconstrained coordinates of
continuous ones, Gibbs on coordinates with few values, Metropolis walks on other integers and on
spheres. Blocks of a mixed support take turns, each given the others. Step sizes and scales are
tuned in the first half of the steps and frozen in the second, over which the rank-normalized R-hat
of every coordinate and of the potential says whether the chains agree.

The last states of the chains are the draws: independent of each other where their starts are, and
approximate in law. Nothing here differentiates with respect to parameters, and all randomness is
torch's global generator.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.errors import EnergyShapeError, NonFiniteEnergyError
from pyro_ebm.ops.rank_rhat import worst_rhat
from pyro_ebm.ops.short_blocks import Block, blocks_of
from pyro_ebm.ops.short_kernel import Point, Potential

__all__ = ["ShortChainResult", "short_chain"]

MIN_STEPS = 8
"""R-hat needs four draws per chain from the second half of the steps."""

MAX_DIAGNOSED_CHAINS = 32
MAX_DIAGNOSED_NUMBERS = 4_000_000
MIN_DIAGNOSED_DRAWS = 20
"""R-hat sees so many chains, with draws thinned, that its cost stays below the sampler's."""


class ShortChainResult(NamedTuple):
    """What a short chain hands back.

    Attributes:
        draws: The last states, shaped, typed and placed as the starting points.
        rhat: The worst rank-normalized split R-hat over coordinates, potential and batch.
        accept_prob: The mean acceptance probability in the second half; 1 for Gibbs sweeps.
    """

    draws: Tensor
    rhat: float
    accept_prob: float


def short_chain(
    potential: Potential,
    support: Constraint,
    init: Tensor,
    *,
    event_dim: int,
    num_steps: int = 200,
) -> ShortChainResult:
    r"""Draws approximately from :math:`p(x) \propto e^{-U(x)}` by short Markov chains.

    Args:
        potential: :math:`U` in nats with respect to the support's own measure, any base included;
            maps ``(..., *batch, *event)`` to ``(..., *batch)``.
        support: Where ``x`` lives; a constraint on one event or on its elements.
        init: Starting points ``(chains, *batch, *event)``. Chains whose potential is not finite
            there restart from others.
        event_dim: Number of event dims of ``init``.
        num_steps: Steps or, for discrete coordinates, sweeps; the first half adapts.

    Returns:
        The last states, their R-hat and the acceptance probability.

    Raises:
        NotImplementedError: If the support has no kernel.
        NonFiniteEnergyError: If no starting point of a batch element has a finite potential.
        EnergyShapeError: If the potential is not one value per event.
        ValueError: If ``init`` has no chain dim or there are fewer than 8 steps.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> _ = torch.manual_seed(0)
        >>> result = short_chain(lambda x: x, constraints.positive, torch.rand(500), event_dim=0)
        >>> bool((result.draws.mean() - 1).abs() < 0.2), result.rhat < 1.2
        (True, True)
    """
    _check_arguments(init, event_dim, num_steps)
    num_warmup = num_steps // 2
    event_shape = init.shape[init.dim() - event_dim :]
    blocks = blocks_of(support, event_shape, num_warmup=num_warmup, device=init.device)
    with torch.inference_mode(mode=False), torch.no_grad():
        chains = _Chains(_checked(potential, event_dim), blocks, init.clone())
        for _ in range(num_warmup):
            chains.sweep(adapt=True)
        chains.freeze()
        return _collect(chains, num_steps - num_warmup)


def _collect(chains: _Chains, num_draws: int) -> ShortChainResult:
    stride = _stride(chains.snapshot().numel(), num_draws)
    accepted, kept = [], []
    for i in range(num_draws):
        accepted.append(chains.sweep(adapt=False))
        if i % stride == stride - 1:
            kept.append(chains.snapshot())
    rhat = worst_rhat(torch.stack(kept))
    return ShortChainResult(chains.states(), rhat, float(torch.stack(accepted).mean()))


class _Chains:
    """The current states of all blocks and the rule by which they take turns."""

    def __init__(self, potential: Potential, blocks: list[Block], x: Tensor) -> None:
        self.potential, self.blocks, self.x = potential, blocks, x
        self.points = self._start()
        finite = torch.stack([point.is_finite for point in self.points]).all(0)
        if not finite.all():
            self.x = _restart_from_others(x, finite)
            self.points = self._start()

    def sweep(self, *, adapt: bool) -> Tensor:
        """Lets every block move once; returns the mean acceptance probability."""
        probs = [self._move(i, adapt=adapt).mean() for i in range(len(self.blocks))]
        return torch.stack(probs).mean()

    def states(self) -> Tensor:
        """Returns the states, shape ``(chains, *batch, *event)``."""
        if len(self.blocks) == 1:
            return self.blocks[0].kernel.events(self.points[0])
        return self.x

    def snapshot(self) -> Tensor:
        """Returns the coordinates and, last, the potential: ``(chains, *batch, D + 1)``."""
        last = self.blocks[-1].kernel.potential(self.points[-1])
        parts = [point.position for point in self.points] + [last[..., None]]
        return torch.cat([part[:MAX_DIAGNOSED_CHAINS].to(last.dtype) for part in parts], -1)

    def freeze(self) -> None:
        """Ends the adaptation of every kernel."""
        for block in self.blocks:
            block.kernel.freeze()

    def _start(self) -> list[Point]:
        return [
            block.kernel.start(block.conditional(self.potential, self.x), block.take(self.x))
            for block in self.blocks
        ]

    def _move(self, i: int, *, adapt: bool) -> Tensor:
        block = self.blocks[i]
        conditional, point = block.conditional(self.potential, self.x), self.points[i]
        if len(self.blocks) > 1:  # the others have moved: what the point remembers is out of date
            point = block.kernel.start(conditional, block.take(self.x))
        self.points[i], prob = block.kernel.step(conditional, point, adapt=adapt)
        if len(self.blocks) > 1:
            self.x = block.put(self.x, block.kernel.events(self.points[i]))
        return prob


def _restart_from_others(x: Tensor, finite: Tensor) -> Tensor:
    """Replaces chains that cannot start by random ones, of the same batch element, that can."""
    if not finite.any(0).all():
        where = " of some batch element" if finite.dim() > 1 else ""
        raise NonFiniteEnergyError(
            f"the potential or its gradient is not finite at any of the {len(x)} starting points"
            f"{where}; check the energy for NaN and infinities on the support, or start elsewhere "
            "(base=, sampler=)"
        )
    weights = finite.reshape(len(x), -1).T.to(torch.get_default_dtype())
    donors = torch.multinomial(weights, len(x), replacement=True).T.reshape(finite.shape)
    own = torch.arange(len(x), device=x.device).reshape((-1,) + (1,) * (finite.dim() - 1))
    source = torch.where(finite, own, donors)
    source = source.reshape(finite.shape + (1,) * (x.dim() - finite.dim()))
    return x.gather(0, source.expand_as(x))


def _stride(numbers: int, num_draws: int) -> int:
    wanted = ceil(numbers * num_draws / MAX_DIAGNOSED_NUMBERS)
    return max(1, min(wanted, num_draws // MIN_DIAGNOSED_DRAWS))


def _checked(potential: Potential, event_dim: int) -> Potential:
    def checked(x: Tensor) -> Tensor:
        value = potential(x)
        expected = x.shape[: x.dim() - event_dim]
        if value.shape != expected:
            raise EnergyShapeError(
                f"the potential returned shape {tuple(value.shape)} for states of shape "
                f"{tuple(x.shape)}; expected {tuple(expected)}, one value per event. "
                "Did you forget .squeeze(-1)?"
            )
        return value

    return checked


def _check_arguments(init: Tensor, event_dim: int, num_steps: int) -> None:
    if init.dim() <= event_dim:
        raise ValueError(
            f"init must have shape (chains, *batch, *event) with {event_dim} event dims, "
            f"got {tuple(init.shape)}"
        )
    if num_steps < MIN_STEPS:
        raise ValueError(f"num_steps must be at least {MIN_STEPS}, got {num_steps}")
