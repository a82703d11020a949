"""The driver: all chains of a kernel in one batch, with Pyro's verbs.

``run`` binds the kernel's target, finds starting points, warms up, and keeps draws; everything is
on the unconstrained space until it is asked for. What was drawn is never lost: interrupting keeps
it, and the last state continues the chains without a new warm-up.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.chains import Record, summary
from pyro_ebm.chains.record import to_numpy
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.mcmc.kernels.adaptation import Adaptation
from pyro_ebm.mcmc.kernels.kernel import Info, Kernel, State
from pyro_ebm.mcmc.kernels.starts import Starts
from pyro_ebm.mcmc.runs.progress import Progress
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.target import Target, Values
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.ops.watch import listening

_NUM_PROBES = 500
_STRETCH = 1.25  # of draws, to look beyond them
_MIN_NAN_SHARE = 0.01


class MCMC:
    """Runs a kernel's chains in one batch.

    Unlike Pyro's, ``get_samples`` returns draws by chain unless told otherwise, and its
    ``num_samples`` are the last ones of every chain; deterministic sites are not recorded, but
    computed by ``Predictive`` from ``get_samples(group_by_chain=False)``.

    Args:
        kernel: One of :mod:`pyro_ebm.mcmc`'s kernels.
        num_samples: Draws kept of each chain.
        warmup_steps: Iterations that tune the kernel and are not kept; ``num_samples`` if not
            given.
        num_chains: C; hundreds cost little more than one.
        thinning: Iterations per kept draw.
        save_params: Names of the sites that :meth:`get_samples` returns; all if not given.
        compile: Whether to hand the captured gradient to ``torch.compile``.
        disable_progbar: Hides the progress bar.

    Raises:
        TypeError: If the kernel is one of Pyro's.
        ValueError: If a number is out of range.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_ebm.mcmc import HMC
        >>> def model(y):
        ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("n", len(y)):
        ...         pyro.sample("y", dist.Normal(m, 1.0), obs=y)
        >>> mcmc = MCMC(HMC(model), 100, 100, num_chains=32, disable_progbar=True)
        >>> mcmc.run(torch.ones(4))
        >>> mcmc.get_samples(group_by_chain=True)["m"].shape
        torch.Size([32, 100])
    """

    def __init__(
        self,
        kernel: Kernel,
        num_samples: int,
        warmup_steps: int | None = None,
        *,
        num_chains: int = 64,
        thinning: int = 1,
        save_params: Sequence[str] | None = None,
        compile: bool = False,  # noqa: A002
        disable_progbar: bool = False,
    ) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(
                f"MCMC runs the kernels of pyro_ebm.mcmc, got {type(kernel).__name__}: run Pyro's "
                "kernels, RecordingNUTS and RecordingHMC by pyro.infer.MCMC"
            )
        self.kernel = kernel
        self.num_samples = whole("num_samples", num_samples, least=1)
        warmup_steps = num_samples if warmup_steps is None else warmup_steps
        self.warmup_steps = whole("warmup_steps", warmup_steps, least=0)
        self.num_chains = whole("num_chains", num_chains, least=1)
        self.thinning = whole("thinning", thinning, least=1)
        if isinstance(save_params, str):
            raise TypeError(f"save_params must be a list of names, got the string {save_params!r}")
        self.save_params = None if save_params is None else list(save_params)
        self.compile = compile
        self.disable_progbar = disable_progbar
        self.target: Target | None = None
        self.state: State | None = None
        self.interrupted = False
        self.seconds = 0.0
        self._draws = torch.empty(0)
        self._stats: dict[str, Tensor] = {}
        self._num_kept = 0
        self._probed: list[str] = []

    # --- running

    def run(
        self,
        *args: Any,
        initial_params: Mapping[str, Tensor] | None = None,
        initial_state: State | None = None,
        **kwargs: Any,
    ) -> None:
        """Draws ``num_samples`` of every chain.

        Args:
            *args: Arguments of the model.
            initial_params: Site name to unconstrained values, as Pyro's are, ``(num_chains, ...)``.
                The model is first run at those of the first chain, so that its density need be
                finite nowhere else; else where draws from (-2, 2) find it so.
            initial_state: A former run's :attr:`state`: its chains go on from there, as they were
                tuned, without a warm-up; bit for bit if :meth:`State.restore_rng` is called first.
            **kwargs: Keyword arguments of the model.

        Raises:
            NonFiniteEnergyError: If a chain cannot start.
            ValueError: If starting values are not of this target and number of chains.
        """
        if initial_state is not None and not isinstance(initial_state, State):
            raise TypeError(
                f"initial_state must be a State, got {type(initial_state).__name__}: that of an "
                "interrupted warm-up does not exist, run again"
            )
        started = time.perf_counter()
        with rng_preserved():  # a run that goes on must not notice that it was bound anew
            target = self.kernel.bind(*args, initial_params=initial_params, **kwargs)
        potential = CapturedPotential(target, compile=self.compile)
        warmup_steps = 0 if initial_state is not None else self.warmup_steps
        starts = Starts(self.kernel, target, potential, self.num_chains)
        state = starts.first_state(initial_params, initial_state)
        self._check_names(target, state.position)
        if initial_state is None:
            state = self.kernel.find_step_size(potential, state)
        self._keep_nothing(target, state)
        total = warmup_steps + self.num_samples * self.thinning
        with tqdm(total=total, disable=self.disable_progbar) as bar:
            try:
                state = self._warm_up(potential, state, warmup_steps, bar)
                self.state = _with_generator(state)
                self._draw(potential, state, bar)
            except KeyboardInterrupt:
                self.interrupted = True
        self._warn_of_lost_chains()
        self._probed = self._nan_edges() + self._overserved()
        for doubt in self.doubts():
            warnings.warn(doubt, ApproximateSampleWarning, stacklevel=2)
        self.seconds = time.perf_counter() - started

    def _check_names(self, target: Target, q: Tensor) -> None:
        known = target.constrain(q[:1]).keys()
        unknown = set(self.save_params or ()) - known
        if unknown:
            raise ValueError(
                f"save_params names {sorted(unknown)}, and {target!r} has {sorted(known)}"
            )

    def _keep_nothing(self, target: Target, state: State) -> None:
        self.target, self.state, self.interrupted = target, None, False
        self._draws = state.position.new_empty(self.num_chains, self.num_samples, target.dim)
        self._stats, self._num_kept, self._probed = {}, 0, []

    def _warm_up(
        self, potential: CapturedPotential, state: State, num_steps: int, bar: Any
    ) -> State:
        if num_steps == 0:
            return state
        adaptation = Adaptation(self.kernel, num_steps)
        state = adaptation.begin(state)
        show = Progress(bar, "warmup")
        for _ in range(num_steps):
            state, info = self.kernel.warm_step(
                potential, state, metric_is_final=adaptation.metric_is_final
            )
            state = adaptation.update(state, info)
            show(state, info)
        return adaptation.finish(state)

    def _draw(self, potential: CapturedPotential, state: State, bar: Any) -> None:
        show = Progress(bar, "sample", self._kept_lp)
        for i in range(self.num_samples):
            diverging: list[Tensor] = []
            for _ in range(self.thinning):
                state, info = self.kernel.step(potential, state)
                show(state, info)
                diverging += [info["diverging"]] if "diverging" in info else []
            if diverging:  # also in the iterations that are not kept
                info = {**info, "diverging": torch.stack(diverging).any(0)}
            self._keep(i, state, info)
            self.state = _with_generator(state)

    def _warn_of_lost_chains(self) -> None:
        """Unadjusted chains can leave for infinity, and their draws are then nothing."""
        if self.kernel.adjusted or self._num_kept == 0 or "diverging" not in self._stats:
            return
        lost = self._stats["diverging"][:, : self._num_kept].any(1)
        if bool(lost.any()):
            warnings.warn(
                f"{int(lost.sum())} of {self.num_chains} chains ran off to where the energy is not "
                "finite, and nothing held them back: use a smaller step size, or a kernel with an "
                "accept step",
                ApproximateSampleWarning,
                stacklevel=3,
            )

    def _nan_edges(self) -> list[str]:
        """Says, of chains that were rejected, whether U is NaN just outside of where they were.

        Under ``vmap`` no log Z that is NaN where its draws tell nothing can warn of it.
        """
        rejected = [self._stats[n] for n in ("diverging", "non_finite") if n in self._stats]
        if self.target is None or not any(bool(x[:, : self._num_kept].any()) for x in rejected):
            return []
        if not self.kernel.adjusted:  # nothing held its chains back, which is said already
            return []
        q = self.positions()[1]
        centre = q.flatten(0, 1).median(0).values
        looks = self._spread_over(q)
        try:
            with torch.no_grad(), pyro.validation_enabled(is_validate=False):
                far = [self.target.potential(centre + _STRETCH * (q[:, i] - centre)) for i in looks]
        except torch.linalg.LinAlgError:  # no density out there either, and no NaN to tell of
            return []
        share = float(torch.stack(far).isnan().double().mean())
        if share < _MIN_NAN_SHARE:
            return []
        return [
            f"the density is NaN at {share:.0%} of the draws once they are {_STRETCH:g} times as "
            "far from their median, and chains are rejected there: the posterior may be cut off. A "
            "log Z made of held draws or nodes is NaN where it does not hold: give it more of "
            "them, nearer to the posterior (no target_accept_prob helps); else look for NaN in the "
            "model"
        ]

    def _overserved(self) -> list[str]:
        """Says of which log Z the error counts, in as many rows as there are, at the draws.

        A replayed potential tells nobody for how many rows log Z is subtracted.
        """
        if self.target is None or not self._num_kept or not self.kernel.knows_potential:
            return []
        q = self.positions()[1]
        with (
            suppress(torch.linalg.LinAlgError),
            listening() as heard,
            torch.no_grad(),
            pyro.validation_enabled(is_validate=False),
        ):
            for i in self._spread_over(q):
                self.target.potential(q[:, i])
                if not heard:  # by far the most models
                    return []
        return [doubt for watch, values in heard.items() if (doubt := watch.doubt(values))]

    def _spread_over(self, q: Tensor) -> list[int]:
        num_looks = min(q.shape[1], max(1, _NUM_PROBES // self.num_chains))
        return torch.linspace(0, q.shape[1] - 1, num_looks).long().tolist()

    def _keep(self, i: int, state: State, info: Info) -> None:
        self._draws[:, i] = state.position
        kept = {"lp": -state.potential, **info} if self.kernel.knows_potential else dict(info)
        if "step_size" in state.tuning:
            kept["step_size"] = state.tuning["step_size"].expand(self.num_chains)
        for name, value in kept.items():
            if name not in self._stats:
                shape = (self.num_chains, self.num_samples)
                self._stats[name] = value.new_empty(shape)
            self._stats[name][:, i] = value
        self._num_kept = i + 1

    def _kept_lp(self) -> Tensor | None:
        """The log densities of the draws so far, ``(num_chains, draws)``, if they are known."""
        lp = self._stats.get("lp")
        return None if lp is None else lp[:, : self._num_kept]

    # --- reading

    def get_samples(
        self,
        num_samples: int | None = None,
        *,
        group_by_chain: bool = True,
        unconstrained: bool = False,
    ) -> Values:
        """Returns the draws by site, ``(num_chains, draws) + event_shape``.

        Args:
            num_samples: The last so many draws of every chain; all if not given.
            group_by_chain: ``False`` joins chains and draws into one dim.
            unconstrained: Whether to return the coordinates that the kernel moved.

        Raises:
            RuntimeError: If nothing was drawn.
            ValueError: If ``num_samples`` is more than was drawn.
        """
        target, draws = self.positions()
        if num_samples is not None:
            last = whole("num_samples", num_samples, least=1)
            if last > self._num_kept:
                raise ValueError(f"{last} draws of a chain were asked for, {self._num_kept} kept")
            draws = draws[:, -last:]
        values = target.split(draws) if unconstrained else target.constrain(draws)
        if self.save_params is not None:
            values = {name: values[name] for name in self.save_params}
        if group_by_chain:
            return values
        return {name: value.flatten(0, 1) for name, value in values.items()}

    def positions(self) -> tuple[Target, Tensor]:
        """Returns what was sampled and the unconstrained draws, ``(num_chains, draws, D)``.

        Raises:
            RuntimeError: If nothing was drawn.
        """
        if self.target is None or self._num_kept == 0:
            raise RuntimeError("nothing was drawn yet: call run() first")
        return self.target, self._draws[:, : self._num_kept]

    @property
    def record(self) -> Record:
        """Draws and statistics as a :class:`~pyro_ebm.chains.Record`."""
        return Record(
            {name: to_numpy(value) for name, value in self.get_samples().items()},
            sample_stats={name: to_numpy(value) for name, value in self.diagnostics().items()},
            sampler=type(self.kernel).__name__,
            adjusted=self.kernel.adjusted,
            inverse_temperature=self.kernel.inverse_temperature,
            seconds=self.seconds,
            attrs={
                **({} if self.kernel.adjusted else {"bias": self.kernel.bias}),
                **({"doubts": "; ".join(doubts)} if (doubts := self.doubts()) else {}),
            },
        )

    def doubts(self) -> list[str]:
        """Returns what kernel and density leave in doubt of the kept draws, a sentence each."""
        if not self._num_kept:
            return []
        return [*self.kernel.doubts(self.diagnostics()), *self._probed]

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns the statistics of every kept draw, ``(num_chains, draws)``."""
        self.positions()
        return {name: value[:, : self._num_kept] for name, value in self._stats.items()}

    def summary(self) -> Any:
        """Returns a table with mean, sd, rank R-hat and effective sample sizes."""
        return summary(self.record)


def _with_generator(state: State) -> State:
    return replace(state, rng=torch.get_rng_state())
