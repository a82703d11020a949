"""Where the chains of a run start: afresh, at given values, or where a former run has ended.

What cannot be started from is refused here, before anything is drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc.kernels.kernel import Kernel, State, finite_start
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.target import Target
from pyro_ebm.ops.rng import rng_preserved

_RESOLUTION = 0.5  # nats


@dataclass(frozen=True)
class Starts:
    """The ways to start a run.

    Args:
        kernel: The kernel, bound.
        target: What it is bound to.
        potential: Its potential.
        num_chains: C.
    """

    kernel: Kernel
    target: Target
    potential: CapturedPotential
    num_chains: int

    def first_state(
        self, initial_params: Mapping[str, Tensor] | None, initial_state: State | None
    ) -> State:
        """Returns where the chains of a run start.

        Args:
            initial_params: Site name to unconstrained values, ``(num_chains, ...)``; drawn if there
                are neither these nor a state.
            initial_state: The state of a former run.

        Raises:
            NonFiniteEnergyError: If a chain cannot start.
            ValueError: If starting values are not of this target and number of chains, or the
                target has noise in it or couples chains.
        """
        if initial_state is not None:
            state = self._taken_over(initial_state)
        else:
            q = self._first_positions(initial_params)
            self.potential.check_density(q)
            state = self.kernel.init(self.potential, q)
        bad = (~torch.isfinite(state.potential)).nonzero()[:, 0].tolist()
        if bad:
            raise NonFiniteEnergyError(
                f"{self.target!r}: the potential is not finite where {len(bad)} of "
                f"{self.num_chains} chains start, and they could not leave: the first of them is "
                f"chain {bad[0]}. Give other initial_params"
            )
        self._check_resolution(state)
        return state

    def _taken_over(self, given: State) -> State:
        """A former run's state, with U of this run's target."""
        self._check_start(given.position)
        self._check_kind(given)
        self.potential.check_density(given.position)
        return self.kernel.refreshed(self.potential, given)

    def _first_positions(self, initial_params: Mapping[str, Tensor] | None) -> Tensor:
        if initial_params is None:
            return finite_start(self.target, self.potential.value, self.num_chains)
        with rng_preserved():
            like = self.target.draw_start(1)
        q = self.target.join(self._checked(initial_params, like))
        self._check_start(q)
        return q

    def _check_resolution(self, state: State) -> None:
        size = float(state.potential.abs().max())
        step = size * torch.finfo(state.potential.dtype).eps
        if step > _RESOLUTION:
            warnings.warn(
                f"{self.target!r}: the potential is about {size:.1g} nats, "
                f"which {state.potential.dtype} resolves to {step:.1g}, and acceptance is by its "
                "differences: use float64, or take off a constant",
                stacklevel=4,
            )

    def _checked(self, params: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """The starting values in the dtype of the target."""
        for name, value in params.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (self.num_chains,):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"initial_params[{name!r}] must be a tensor with num_chains = "
                    f"{self.num_chains} as its first dim, got {got}"
                )
        return {name: value.to(like) for name, value in params.items()}

    def _check_kind(self, state: State) -> None:
        """Raises unless the state is one that this kernel makes."""
        name = type(self.kernel).__name__
        if state.kernel not in ("", self.kernel.kind):
            raise ValueError(
                f"initial_state was tuned for {state.kernel}, and this is {self.kernel.kind}"
            )
        with rng_preserved():
            own = self.kernel.init(self.potential, state.position)
        for what in ("tuning", "extra"):
            have, want = (_shapes(getattr(s, what)) for s in (state, own))
            if have != want:
                raise ValueError(
                    f"initial_state is not one of {name} as it is made here: its {what} has "
                    f"{have}, expected {want}"
                )

    def _check_start(self, q: Tensor) -> None:
        want = (self.num_chains, self.target.dim)
        if tuple(q.shape) != want:
            raise ValueError(
                f"starting values for {q.shape[0]} chains and {q.shape[1]} unconstrained "
                f"coordinates were given, expected {want[0]} and {want[1]}"
            )


def _shapes(values: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes; a metric may be a diagonal or a matrix."""
    return {n: () if n == "root" else tuple(v.shape) for n, v in sorted(values.items())}
