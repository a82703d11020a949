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
from pyro_ebm.mcmc.kernels.kernel import Kernel, State, check_untempered, finite_start, ran_off
from pyro_ebm.mcmc.kernels.ula import ULA
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.target import Target
from pyro_ebm.ops.arguments import share, whole


class Slots:
    """States that persist: which of them are used next, which start afresh, and how old they are.

    They change in place, where steps that are recorded as a graph go on to find them.

    Args:
        size: Slots.
        num_steps: Steps that a state moves at every use.
        restart_prob: Share of the slots used that start afresh.

    Attributes:
        positions: The states, ``(size,)`` + the shape of one; ``None`` before they are filled.
        ages: Steps since each slot's start, ``(size,)``.
        num_lost: Chains that ran off to where the energy is not finite, and were restarted.

    Example:
        >>> slots = Slots(3, num_steps=5, restart_prob=0.0)
        >>> slots.fill(torch.zeros(3, 2))
        >>> which, restarts = slots.choose(1)
        >>> slots.write(which, torch.ones(1, 2), lost=torch.tensor([False]))
        >>> slots.positions.sum(), slots.ages.sum()
        (tensor(2.), tensor(5))
    """

    def __init__(self, size: int, *, num_steps: int, restart_prob: float) -> None:
        self.size = whole("size", size, least=1)
        self.num_steps = whole("num_steps", num_steps, least=1)
        self.restart_prob = share("restart_prob", restart_prob)
        self.positions: Tensor | None = None
        self.ages = torch.zeros(self.size, dtype=torch.long)
        self._num_lost = torch.tensor(0)

    @property
    def num_lost(self) -> int:
        """How many ran off so far."""
        return int(self._num_lost)

    def fill(self, positions: Tensor) -> None:
        """Puts a first state, of age zero, into every slot."""
        self.positions = positions.clone()
        self.ages = torch.zeros_like(self.ages, device=positions.device)

    def to(self, device: torch.device) -> None:
        """Moves the states to another device, in case they are elsewhere."""
        if self.positions is not None and self.positions.device != device:
            self.positions, self.ages = self.positions.to(device), self.ages.to(device)
            self._num_lost = self._num_lost.to(device)

    def choose(self, num: int) -> tuple[Tensor, Tensor]:
        """Returns slots ``(num,)``, none of them twice, and which of them are to start afresh.

        Raises:
            ValueError: If more are asked for than there are.
        """
        if not 1 <= num <= self.size:
            raise ValueError(
                f"{num} draws were asked of {self.size} slots: raise size= of the buffer"
            )
        device = self.ages.device
        slots = torch.randperm(self.size, device=device)[:num]
        restarts = torch.rand(num, device=device) < self.restart_prob
        return slots, restarts

    def restart(self, slots: Tensor, which: Tensor) -> None:
        """Sets the ages of slots ``(num,)`` to zero where ``which``, of that shape, holds."""
        self.ages[slots] = torch.where(which, 0, self.ages[slots])

    def write(self, slots: Tensor, q: Tensor, *, lost: Tensor) -> None:
        """Writes states that have moved back to the slots that they were taken from.

        Args:
            slots: Where they came from, ``(num,)``.
            q: The states; of chains that were lost, fresh ones.
            lost: Which were lost, ``(num,)``.
        """
        self._num_lost += lost.sum().to(self._num_lost)
        self.ages[slots] = torch.where(lost, 0, self.ages[slots] + self.num_steps)
        self.positions[slots] = q  # type: ignore[index]

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
        if positions is None or self.positions is None or positions.shape != self.positions.shape:
            self.positions = None if positions is None else positions.clone()
        else:
            self.positions.copy_(positions)
        self.ages.copy_(state["ages"])
        self._num_lost.fill_(state["num_lost"])


class ReplayBuffer(Slots):
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
        super().__init__(size, num_steps=num_steps, restart_prob=restart_prob)
        self.kernel = kernel

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
        if dist.batch_shape != ():
            raise ValueError(
                "ReplayBuffer keeps the chains of one law, and this one has batch_shape "
                f"{tuple(dist.batch_shape)}: draw sample_shape from the law without a batch"
            )
        kernel = self.kernel(dist)
        check_resumable(kernel, "ReplayBuffer")
        target = kernel.bind()
        potential = CapturedPotential(target, capture=False)
        slots, state = self._take(kernel, target, potential, shape.numel())
        for _ in range(self.num_steps):
            state, _ = kernel.step(potential, state)
        q = self._put(target, potential, slots, state)
        x = target.constrain(q)["x"].detach()
        return x.reshape(shape + x.shape[1:])

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
            self.fill(target.draw_start(self.size))
        slots, restarts = self.choose(num)
        q = _restarted(target, potential, self.positions[slots], restarts)  # type: ignore[index]
        state = kernel.init(potential, q)
        lost = ran_off(state)
        if bool(lost.any()):  # the law has changed since
            state = kernel.init(potential, _restarted(target, potential, q, lost))
        self.restart(slots, restarts | lost)
        return slots, state

    def _put(
        self, target: Target, potential: CapturedPotential, slots: Tensor, state: State
    ) -> Tensor:
        """Writes the chains back to their slots; those that ran off start afresh."""
        q = state.position.detach()
        lost = ~(torch.isfinite(state.potential) & torch.isfinite(q).all(-1))
        if bool(lost.any()):
            warnings.warn(
                f"{int(lost.sum())} of {len(q)} chains ran off to where the energy is not finite "
                "and were restarted: use a smaller step size, or a confined energy",
                ApproximateSampleWarning,
                stacklevel=3,
            )
        q = _restarted(target, potential, q, lost)
        self.write(slots, q, lost=lost)
        return q


def _restarted(target: Target, potential: CapturedPotential, q: Tensor, which: Tensor) -> Tensor:
    """Positions with fresh ones where ``which`` holds."""
    if not bool(which.any()):
        return q
    q = q.clone()
    q[which] = finite_start(target, potential.value, int(which.sum()))
    return q


def check_resumable(kernel: Kernel, user: str) -> None:
    """Raises unless a kernel's chains may be taken up at their positions alone, without tuning.

    Args:
        kernel: The kernel.
        user: Who keeps the positions, for messages.

    Raises:
        ValueError: If it is tempered, or has no step size.
        TypeError: If it remembers more than positions.
    """
    name = type(kernel).__name__
    check_untempered(kernel, user)
    if not kernel.goes_on_from_position:
        raise TypeError(f"{user} keeps positions, and {name} remembers more: use HMC")
    if kernel.adapt_step_size and kernel.step_size is None:
        raise ValueError(
            f"{user} does not tune its kernel: bind a step size, as by "
            f"functools.partial({name}, step_size=0.1)"
        )
