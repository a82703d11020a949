"""One chain of a kernel, a transition at a time: what Pyro's own driver asks for.

``pyro.infer.MCMC`` sets a kernel up, asks for one draw after another, and for diagnostics at the
end. A chain alone is warmed up as a batch of one: step sizes and a diagonal metric from its own
past.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.adaptation import Adaptation
from pyro_ebm.mcmc.kernels.kernel import Info, Kernel
from pyro_ebm.mcmc.kernels.starts import Starts
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.ops.rng import rng_preserved


class OneChain:
    """A chain that is warmed up first and then keeps the statistics of every draw.

    Args:
        kernel: What moves it.
        warmup_steps: Transitions that tune the kernel.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.
        initial_params: Site name to unconstrained values; drawn if there are none.

    Raises:
        NonFiniteEnergyError: If the chain cannot start.
        ValueError: If starting values are not of this target.
    """

    def __init__(
        self,
        kernel: Kernel,
        warmup_steps: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        initial_params: Mapping[str, Tensor] | None,
    ) -> None:
        one = {name: value[None] for name, value in (initial_params or {}).items()} or None
        with rng_preserved():
            self.target = kernel.bind(*args, initial_params=one, **kwargs)
        self.kernel, self.potential = kernel, CapturedPotential(self.target)
        starts = Starts(kernel, self.target, self.potential, num_chains=1)
        state = kernel.find_step_size(self.potential, starts.first_state(one, None))
        self._left = warmup_steps
        self._adaptation = Adaptation(kernel, warmup_steps)
        self.state = self._adaptation.begin(state) if warmup_steps else state
        self._rows: list[Info] = []
        self._last: Info = {}

    def values(self) -> Values:
        """Returns where the chain is, site by site on its support."""
        return {name: x[0] for name, x in self.target.constrain(self.state.position).items()}

    def move(self) -> None:
        """Makes a transition, of the warm-up as long as that lasts."""
        if self._left == 0:
            self.state, self._last = self.kernel.step(self.potential, self.state)
            self._rows.append(self._statistics())
            return
        self._left -= 1
        state, self._last = self.kernel.warm_step(
            self.potential, self.state, metric_is_final=self._adaptation.metric_is_final
        )
        self.state = self._adaptation.update(state, self._last)
        if self._left == 0:
            self.state = self._adaptation.finish(self.state)

    def _statistics(self) -> Info:
        kept = {"lp": -self.state.potential} if self.kernel.knows_potential else {}
        tuned = {n: v for n, v in self.state.tuning.items() if n == "step_size"}
        return {name: value.reshape(()) for name, value in (kept | tuned | self._last).items()}

    def shown(self) -> dict[str, str]:
        """Returns what a progress bar says."""
        said = {"step size": self.state.tuning.get("step_size")}
        said["acc. prob"] = self._last.get("acceptance_rate")
        return {name: f"{float(value):.2e}" for name, value in said.items() if value is not None}

    def diagnostics(self) -> dict[str, Any]:
        """Returns ``sample_stats``, an array over the draws each, and which of them diverged.

        Beside them what a record has to know of the kernel, which may have run in another process.
        """
        names = self._rows[0] if self._rows else ()
        columns = {n: torch.stack([row[n] for row in self._rows]).cpu().numpy() for n in names}
        diverging = columns.get("diverging", np.zeros(0))
        stats = {name: torch.as_tensor(column)[None] for name, column in columns.items()}
        return {
            "sample_stats": columns,
            "divergences": np.flatnonzero(diverging).tolist(),
            "adjusted": self.kernel.adjusted,
            "bias": self.kernel.bias,
            "doubts": self.kernel.doubts(stats),
        }
