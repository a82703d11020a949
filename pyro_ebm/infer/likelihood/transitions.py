r"""What moves states under an energy-based law: kernels of the engine, Gibbs sweeps, or a function.

Likelihood objectives need states that have moved by k steps of a kernel that leaves
:math:`p(x) \propto e^{-U(x)}` invariant. Here every row is a chain of its own, accepted for itself,
under the energy of its own row: so conditional models are moved as they are.

- On continuous supports a kernel of :mod:`pyro_ebm.mcmc` moves the unconstrained coordinates, with
  the Jacobian of the bijection as part of the potential.
- On discrete supports one step is a systematic-scan Gibbs sweep (a Metropolis walk where a
  coordinate has no short list of values), on spheres a walk on the surface.
- A function ``(p, x) -> x'`` of the user's takes the place of both: block Gibbs of an RBM, cluster
  moves of a lattice, exact draws. That it leaves p invariant is the user's word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.layers import unvalidated
from pyro_ebm.distributions.supports import tensors_in
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.mcmc.kernels.kernel import Kernel
from pyro_ebm.mcmc.runs.replay_buffer import check_resumable
from pyro_ebm.mcmc.targets.captured import CapturedPotential, ValueOnly
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.mcmc.targets.target import GaussianPrior
from pyro_ebm.ops.short_blocks import blocks_of

__all__ = [
    "EachRow",
    "KernelFactory",
    "Moved",
    "Mover",
    "Transition",
    "check_one_support",
    "replaced",
]

KernelFactory = Callable[[EnergyDistribution], Kernel]
"""A kernel of :mod:`pyro_ebm.mcmc` with its options bound, as ``partial(MALA, step_size=0.1)``."""

Transition = Callable[[EnergyDistribution, Tensor], Tensor]
"""One step: events ``lead + event`` to events of the same shape and dtype."""


class Moved(NamedTuple):
    """Where chains are after their steps.

    Args:
        x: Events, ``lead + event``; chains that were lost or never accepted are where they started,
            to the last bit.
        lost: Which chains ran off to where the energy is not finite, ``lead``.
        acceptance: Mean acceptance probability over the steps, ``lead``; ``None`` where nothing is
            ever rejected.
        temperature: Of the law that the kernel aims at, where it is not the energy's own.
    """

    x: Tensor
    lost: Tensor
    acceptance: Tensor | None = None
    temperature: float | None = None


class EachRow(DistributionTarget):
    """A batch of laws as the target of one chain each, instead of one chain for all.

    Args:
        law: An ``EnergyDistribution`` on a continuous support, expanded to the rows.
        x: Where the rows' chains start, ``batch + event``.

    Raises:
        NotImplementedError: If rows have supports of their own.
    """

    def __init__(self, law: EnergyDistribution, x: Tensor) -> None:
        check_one_support(law)
        self._start = x
        super().__init__(law)
        self.dim = self.space.size
        if self.prior is not None:
            self.prior = GaussianPrior(*(part.reshape(-1, self.dim) for part in self.prior))

    def potential(self, q: Tensor) -> Tensor:
        """Returns U in nats of the unconstrained coordinates ``(R, D)`` of all R rows, ``(R,)``."""
        if self._is_real:
            return _flat(self._density(self._on_support(q)), self.law)
        x, log_det = self.space.with_log_det(self._coordinates(q.flatten()))
        return _flat(self._density(x) - log_det, self.law)

    def energy(self, q: Tensor) -> Tensor:
        """Returns E with respect to the base in nats, ``(R,)``."""
        return _flat(self.law.energy(self._on_support(q)), self.law)

    def _on_support(self, q: Tensor) -> Tensor:
        return super()._on_support(q.flatten())

    def draw_start(self, num_chains: int) -> Tensor:
        """Returns the rows' own starts ``(R, D)``; nothing is drawn."""
        return self.space.to_unconstrained(self._start).reshape(-1, self.space.size)

    @torch.no_grad()
    def events(self, q: Tensor) -> Tensor:
        """Returns the rows' events, ``batch + event``."""
        return self._on_support(q)


class Mover:
    """Moves states by a number of steps.

    Args:
        num_steps: Steps; sweeps where there are no gradients.
        kernel: Makes the kernel that is used on continuous supports.
        transition: A function ``(p, x) -> x'`` for every support, instead of a kernel.
        user: Who moves states, for messages.

    Raises:
        TypeError: If the kernel or the transition cannot be called.
        ValueError: If both are given.
    """

    def __init__(
        self,
        num_steps: int,
        kernel: KernelFactory | None,
        transition: Transition | None,
        *,
        user: str,
    ) -> None:
        if kernel is not None and transition is not None:
            raise ValueError(f"{user} takes kernel= or transition=, not both")
        for name, given in (("kernel", kernel), ("transition", transition)):
            _check_callable(name, given, user)
        self.num_steps = num_steps
        self.kernel = kernel
        self.transition = transition
        self.user = user

    def takes_default(self, p: EnergyDistribution) -> bool:
        """Whether states under a law are moved by a kernel that was not given."""
        return self.kernel is None and self.transition is None and p.base_measure == "lebesgue"

    @torch.no_grad()
    def __call__(
        self, p: EnergyDistribution, x: Tensor, default: KernelFactory | None = None
    ) -> Moved:
        """Returns where chains are that start at ``x``, ``lead + rows + event``.

        Args:
            p: The law, of every row.
            x: Where they start.
            default: Makes the kernel where it :meth:`takes_default`.

        Raises:
            TypeError: If a kernel was given and the support is not continuous, or it is none of
                :mod:`pyro_ebm.mcmc`.
            ValueError: If a kernel has no step size, or a transition returns another shape.
            NotImplementedError: Without a transition, on mixed supports or where rows have supports
                of their own.
        """
        law = unvalidated(p.expand(rows_of(p, x)))
        if self.transition is not None:
            return self._by_function(p, x)
        if law.base_measure == "lebesgue":
            return self._by_kernel(law, x, self.kernel or default)  # type: ignore[arg-type]
        if self.kernel is not None:
            raise TypeError(
                f"{self.user}: a kernel needs a continuous support, got {law.support}; leave it "
                "out for Gibbs sweeps, or give transition=, a function (p, x) -> x'"
            )
        return self._by_sweeps(law, x)

    def _by_kernel(self, law: EnergyDistribution, x: Tensor, make: KernelFactory) -> Moved:
        kernel = make(law)
        _check_ours(kernel, self.user)
        check_resumable(kernel, self.user)
        target = EachRow(law, x)
        potential = CapturedPotential(target, capture=False)
        last = ValueOnly(target, capture=False) if _evaluates_last(kernel) else potential
        begin = target.draw_start(law.batch_shape.numel())
        state = kernel.init(potential, begin)
        lost, rates = ~state.potential.isfinite(), []
        for i in range(self.num_steps):
            state, info = kernel.step(last if i == self.num_steps - 1 else potential, state)
            if "acceptance_rate" in info:
                rates.append(info["acceptance_rate"])
        lost = lost | ~(state.potential.isfinite() & state.position.isfinite().all(-1))
        rows = law.batch_shape
        acceptance = torch.stack(rates).mean(0).reshape(rows) if rates else None
        ends = target.events(state.position)
        temperature = getattr(kernel, "temperature", None)
        still = (state.position == begin).all(-1)  # there and back, the bijection would round
        lost, stay = lost.reshape(rows), (lost | still).reshape(rows)
        return Moved(replaced(ends, x, stay), lost, acceptance, temperature)

    def _by_sweeps(self, law: EnergyDistribution, x: Tensor) -> Moved:
        if law.base_measure == "mixed":
            raise NotImplementedError(
                f"{self.user} has no kernel that needs no tuning for the mixed support "
                f"{law.support}: give transition=, a function (p, x) -> x'"
            )
        blocks = blocks_of(law.support, law.event_shape, device=x.device)
        chains, rates = x.unsqueeze(0), []
        for _ in range(self.num_steps):
            for block in blocks:
                conditional = block.conditional(lambda y: _rows(law.potential(y), y, law), chains)
                point = block.kernel.start(conditional, block.take(chains))
                point, rate = block.kernel.step(conditional, point)
                chains = block.put(chains, block.kernel.events(point))
                rates.append(rate[0])
        lost = torch.zeros(law.batch_shape, dtype=torch.bool, device=x.device)
        return Moved(chains[0], lost, torch.stack(rates).mean(0))

    def _by_function(self, p: EnergyDistribution, x: Tensor) -> Moved:
        moved = x
        for _ in range(self.num_steps):
            moved = self.transition(p, moved)  # type: ignore[misc]
            _check_moved(moved, x, self.user)
        lost = ~moved.isfinite().reshape(rows_of(p, x) + (-1,)).all(-1)
        return Moved(replaced(moved.detach(), x, lost), lost)


def _evaluates_last(kernel: Kernel) -> bool:
    """Whether it is said of the very step that the kernel takes, not of one that it overrides."""
    owner = next(part for part in type(kernel).__mro__ if "step" in vars(part))
    return bool(vars(owner).get("evaluates_last", False))


def check_one_support(law: EnergyDistribution) -> None:
    """Raises ``NotImplementedError`` if rows have bounds of their own: their coordinates differ.

    Example:
        >>> from torch.distributions.constraints import greater_than
        >>> law = EnergyDistribution(lambda x: x, support=greater_than(torch.zeros(5)))
        >>> check_one_support(law)
        Traceback (most recent call last):
        ...
        NotImplementedError: rows have supports of their own, with bounds of shape (5,), ...
    """
    for bound in tensors_in(law.support):
        if bound.shape[: max(0, bound.dim() - len(law.event_shape))].numel() > 1:
            raise NotImplementedError(
                f"rows have supports of their own, with bounds of shape {tuple(bound.shape)}, and "
                "kernels move all rows in the coordinates of one: use ScoreMatching or "
                "EnergyDiscrepancy, or give transition=, a function (p, x) -> x'"
            )


def replaced(x: Tensor, fresh: Tensor, which: Tensor) -> Tensor:
    """Returns events ``lead + event`` with others of that shape where ``which``, ``lead``, holds.

    Example:
        >>> replaced(torch.zeros(2, 2), torch.ones(2, 2), torch.tensor([False, True]))
        tensor([[0., 0.],
                [1., 1.]])
    """
    return torch.where(which.reshape(which.shape + (1,) * (x.dim() - which.dim())), fresh, x)


def _flat(value: Tensor, law: EnergyDistribution) -> Tensor:
    _check_rows(value, law.batch_shape, law)
    return value.flatten()


def _rows(value: Tensor, x: Tensor, law: EnergyDistribution) -> Tensor:
    _check_rows(value, rows_of(law, x), law)
    return value


def _check_rows(value: Tensor, rows: torch.Size, law: EnergyDistribution) -> None:
    if value.shape != rows:
        raise ValueError(
            f"{law!r}: chains need one energy per row {tuple(rows)}, got {tuple(value.shape)}: "
            "parameters with dims of their own need a batch shape that shows them (a plate)"
        )


def _check_callable(name: str, given: Any, user: str) -> None:
    if given is not None and (isinstance(given, Kernel) or not callable(given)):
        how = "functools.partial(MALA, step_size=0.1)" if name == "kernel" else "(p, x) -> x'"
        raise TypeError(f"{user}: {name} must be a function such as {how}, got {given!r}")


def _check_ours(kernel: Any, user: str) -> None:
    if not isinstance(kernel, Kernel):
        kind = f"{type(kernel).__module__}.{type(kernel).__name__}"
        raise TypeError(
            f"{user}: kernel must make a kernel of pyro_ebm.mcmc, which steps all chains at once, "
            "such as functools.partial(pyro_ebm.mcmc.NUTS, step_size=0.1) instead of "
            f"pyro.infer.NUTS, got {kind}"
        )


def _check_moved(moved: Any, x: Tensor, user: str) -> None:
    if not isinstance(moved, Tensor):
        raise TypeError(f"{user}: transition must return a tensor, got {type(moved).__name__}")
    if moved.shape != x.shape or moved.dtype != x.dtype:
        raise ValueError(
            f"{user}: transition must return events shaped and typed as it was given, "
            f"{tuple(x.shape)} {x.dtype}; got {tuple(moved.shape)} {moved.dtype}"
        )
