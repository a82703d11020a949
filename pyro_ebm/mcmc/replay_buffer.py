r"""Persistent chains: a buffer of states that go on from one training step to the next.

Training by maximum likelihood asks for draws of :math:`p_\theta` at every step, and
:math:`\theta` moves little in one: chains that go on from where they were are nearly there already.
That is right in the limit of small learning rates, as stochastic approximation; how far it is off
otherwise cannot be seen from the chains alone. A share of the slots starts afresh at every use, so
that the buffer does not settle in some of the modes for good.

References:
    Younes, Parametric inference for imperfectly observed Gibbsian fields, 1989; Tieleman, Training
    restricted Boltzmann machines using approximations to the likelihood gradient, ICML 2008; Du,
    Mordatch, Implicit generation and modeling with energy-based models, 2019, arXiv:1903.08689 (the
    buffer with restarts).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.checks import share, whole
from pyro_ebm.mcmc.kernel import Kernel, State, check_untempered, finite_start
from pyro_ebm.mcmc.target import Target
from pyro_ebm.mcmc.ula import ULA


class ReplayBuffer:
    """Draws of a law that is being trained, by chains that persist.

    It can be passed as ``sampler=`` of a distribution. Kernels are not adapted: their step size is
    the one that they are made with.

    Args:
        kernel: Makes the kernel; bind its options by ``functools.partial``.
        size: Slots.
        num_steps: Steps of the kernel at every use.
        restart_prob: Share of the slots used that start afresh, from the base or spread over the
            support.

    Attributes:
        positions: Unconstrained positions, ``(size, D)``; ``None`` before the first use.
        ages: Steps since each slot's start, ``(size,)``.
        num_lost: Chains that ran off to where the energy is not finite, and were restarted.

    Example:
        >>> from functools import partial
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
        >>> buffer = ReplayBuffer(partial(ULA, step_size=0.3), size=100, num_steps=5)
        >>> buffer(law, (20,)).shape
        torch.Size([20])
        >>> int((buffer.ages > 0).sum())
        20
    """

    def __init__(
        self,
        kernel: Callable[[EnergyDistribution], Kernel] = ULA,
        *,
        size: int = 10_000,
        num_steps: int = 20,
        restart_prob: float = 0.05,
    ) -> None:
        self.kernel = kernel
        self.size = whole("size", size, least=1)
        self.num_steps = whole("num_steps", num_steps, least=1)
        self.restart_prob = share("restart_prob", restart_prob)
        self.positions: Tensor | None = None
        self.ages = torch.zeros(self.size, dtype=torch.long)
        self.num_lost = 0

    def __call__(
        self, dist: EnergyDistribution, sample_shape: torch.Size | tuple[int, ...] = ()
    ) -> Tensor:
        """Moves as many slots as draws are asked for, and returns their values.

        Args:
            dist: The law as it is now, with ``batch_shape == ()``.
            sample_shape: Shape of the sample; at most :attr:`size` draws.

        Returns:
            Detached draws, ``sample_shape + event_shape``.

        Raises:
            ValueError: If more draws are asked for than there are slots, the law has a batch, or
                the kernel has no step size.
            TypeError: If the kernel remembers more than positions.

        Warns:
            ApproximateSampleWarning: If chains ran off and had to be restarted.
        """
        shape = torch.Size(sample_shape)
        self._check(dist, shape)
        kernel = self.kernel(dist)
        self._check_kernel(kernel)
        target = kernel.bind()
        potential = CapturedPotential(target, capture=False)
        slots, state = self._take(kernel, target, potential, shape.numel())
        for _ in range(self.num_steps):
            state, _ = kernel.step(potential, state)
        q = self._put(target, potential, slots, state)
        x = target.constrain(q)["x"].detach()
        return x.reshape(shape + x.shape[1:])

    def _check(self, dist: EnergyDistribution, shape: torch.Size) -> None:
        if dist.batch_shape != ():
            raise ValueError(
                "ReplayBuffer keeps the chains of one law, and this one has batch_shape "
                f"{tuple(dist.batch_shape)}: draw sample_shape from the law without a batch"
            )
        if not 1 <= shape.numel() <= self.size:
            raise ValueError(
                f"{shape.numel()} draws were asked of {self.size} slots: raise size= of the buffer"
            )

    @staticmethod
    def _check_kernel(kernel: Kernel) -> None:
        name = type(kernel).__name__
        check_untempered(kernel, "ReplayBuffer")
        if not kernel.goes_on_from_position:
            raise TypeError(f"ReplayBuffer keeps positions, and {name} remembers more: use HMC")
        if kernel.adapt_step_size and kernel.step_size is None:
            raise ValueError(
                f"ReplayBuffer does not tune its kernel: bind a step size, as by "
                f"functools.partial({name}, step_size=0.1)"
            )

    def _take(
        self, kernel: Kernel, target: Target, potential: CapturedPotential, num: int
    ) -> tuple[Tensor, State]:
        """Slots, none of them twice, and where their chains go on."""
        if self.positions is not None and self.positions.shape[1] != target.dim:
            raise ValueError(
                f"this buffer holds chains of {self.positions.shape[1]} coordinates, and "
                f"{target!r} has {target.dim}: give every law a buffer of its own"
            )
        if self.positions is None:
            self.positions = target.draw_start(self.size)
            self.ages = torch.zeros_like(self.ages, device=self.positions.device)
        device = self.positions.device
        slots = torch.randperm(self.size, device=device)[:num]
        restarts = torch.rand(num, device=device) < self.restart_prob
        q = _restarted(target, potential, self.positions[slots], restarts)
        state = kernel.init(potential, q)
        lost = ~torch.isfinite(state.potential)
        if bool(lost.any()):  # the law has changed since
            state = kernel.init(potential, _restarted(target, potential, q, lost))
        self.ages[slots[restarts | lost]] = 0
        return slots, state

    def _put(
        self, target: Target, potential: CapturedPotential, slots: Tensor, state: State
    ) -> Tensor:
        """Writes the chains back to their slots; those that ran off start afresh."""
        q = state.position.detach()
        lost = ~(torch.isfinite(state.potential) & torch.isfinite(q).all(-1))
        if bool(lost.any()):
            self.num_lost += int(lost.sum())
            warnings.warn(
                f"{int(lost.sum())} of {len(q)} chains ran off to where the energy is not finite "
                "and were restarted: use a smaller step size, or a confined energy",
                ApproximateSampleWarning,
                stacklevel=3,
            )
        q = _restarted(target, potential, q, lost)
        self.ages[slots] = torch.where(lost, 0, self.ages[slots] + self.num_steps)
        self.positions[slots] = q  # type: ignore[index]
        return q

    # --- saving

    def state_dict(self) -> dict[str, Any]:
        """Returns what goes on from one process to the next."""
        return {"positions": self.positions, "ages": self.ages, "num_lost": self.num_lost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: If it is of another number of slots.
        """
        if len(state["ages"]) != self.size:
            raise ValueError(f"a buffer of {self.size} slots cannot load {len(state['ages'])}")
        positions = state["positions"]
        self.positions = None if positions is None else positions.clone()
        self.ages, self.num_lost = state["ages"].clone(), int(state["num_lost"])


def _restarted(target: Target, potential: CapturedPotential, q: Tensor, which: Tensor) -> Tensor:
    """Positions with fresh ones where ``which`` holds."""
    if not bool(which.any()):
        return q
    q = q.clone()
    q[which] = finite_start(target, potential.value, int(which.sum()))
    return q
