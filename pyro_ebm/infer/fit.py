"""A training loop: one torch optimizer for all that model, guide and objective register.

Pyro's ``SVI`` works with every objective; ``fit`` adds what training an energy usually wants:
mini-batches, a validation curve, an average of the weights, gradient clipping, checkpoints, and a
progress bar with the objective's diagnostics. Interrupting it (Ctrl-C) keeps what was learned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_ebm.infer import checks
from pyro_ebm.infer.checkpoint import load_checkpoint, save_checkpoint
from pyro_ebm.infer.minibatch import Batches
from pyro_ebm.infer.objective import Objective

Data = Tensor | Sequence[Tensor]
_OWN = "log_normalizer of "


@dataclass
class FitResult:
    """What a fit leaves behind.

    Args:
        losses: Loss per datum in nats, one per step. A surrogate's value, not a likelihood.
        diagnostics: ``{"site/name": values}``, one value per step in which it was computed.
        diagnostic_steps: The steps, from 1, that these values belong to: not all where two players
            take turns.
        validation: ``(step, loss per datum)`` pairs on the validation data.
        averaged: Exponential moving averages of the parameters by name, if asked for.
        num_steps: Steps done, over all runs that a checkpoint joins.
        seconds: Wall time of this run.
        interrupted: Whether Ctrl-C ended it early.
    """

    losses: list[float] = field(default_factory=list)
    diagnostics: dict[str, list[float]] = field(default_factory=dict)
    diagnostic_steps: dict[str, list[int]] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)
    averaged: dict[str, Tensor] = field(default_factory=dict)
    num_steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    _parameters: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def use_average(self) -> None:
        """Copies the averaged parameters into the live ones.

        Raises:
            ValueError: If the fit kept no average.
        """
        if not self.averaged:
            raise ValueError("no average was kept: fit(..., ema=0.999)")
        for name, value in self.averaged.items():
            self._parameters[name].copy_(value)


def fit(
    model: Callable[..., Any],
    data: Data,
    objective: Trace_ELBO,
    *,
    guide: Callable[..., Any] | None = None,
    optim: type[torch.optim.Optimizer] = torch.optim.Adam,
    lr: float = 1e-3,
    batch_size: int | None = None,
    num_steps: int = 1000,
    ema: float | None = None,
    grad_clip: float | None = None,
    schedule: tuple[int, int] | None = None,
    validation: Data | None = None,
    validate_every: int = 100,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    seed: int | None = None,
    disable_progbar: bool = False,
) -> FitResult:
    """Learns a model's parameters with an objective.

    Args:
        model: Called as ``model(*batch)``; its plates should have the batch's size (``len(x)``), or
            with ``batch_size=None`` subsample for themselves.
        data: A tensor or a sequence of tensors with a common first dim N, passed to model and
            guide.
        objective: An :class:`Objective` (or any ``Trace_ELBO``).
        guide: Latents' variational factors and the objective's contrasts.
        optim: A torch optimizer class.
        lr: Learning rate; ten times as much for a log Z learned by gradient.
        batch_size: Rows per step, drawn without replacement in each epoch. Sites in the plate over
            rows, found by running the model on one row more, are scaled by N / batch_size.
        num_steps: Steps to do, those of the checkpoint included.
        ema: Decay of the moving average of parameters, for example 0.999.
        grad_clip: Largest gradient norm over all parameters.
        schedule: Overrides the objective's ``(energy steps, generator steps)``.
        validation: Data for the validation curve.
        validate_every: Steps between its points.
        checkpoint: File to save to (every ``checkpoint_every`` steps, at the end and on failure)
            and to resume from.
        checkpoint_every: Steps between saves.
        seed: Seeds Pyro at the start.
        disable_progbar: Hides the progress bar.

    Returns:
        Curves, averages and timings.

    Raises:
        ValueError: If arguments are out of range or the tensors of ``data`` differ in length.
        NonFiniteEnergyError: If a surrogate is not finite; the checkpoint, if any, has been
            written.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_ebm.distributions import EnergyDistribution
        >>> from pyro_ebm.infer import NCE
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(x)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=x)
        >>> noise = dist.Normal(0.0, 1.5)
        >>> options = {"lr": 0.05, "num_steps": 150, "disable_progbar": True}
        >>> result = fit(model, torch.randn(500), NCE(noise=noise), **options)
        >>> abs(pyro.param("precision").item() - 1.0) < 0.3
        True
    """
    if seed is not None:
        pyro.set_rng_seed(seed)
    batches = Batches(_as_tuple(data), batch_size)
    run = _Run(model, guide or _no_guide, objective, batches, optim, lr)
    with _scheduled(objective, schedule):
        if checkpoint is not None and Path(checkpoint).exists():
            load_checkpoint(Path(checkpoint), run)
        started = time.perf_counter()
        try:
            run.loop(
                num_steps,
                ema=ema,
                grad_clip=grad_clip,
                validation=None if validation is None else _as_tuple(validation),
                validate_every=validate_every,
                save=None if checkpoint is None else (Path(checkpoint), checkpoint_every),
                disable_progbar=disable_progbar,
            )
        except KeyboardInterrupt:
            run.result.interrupted = True
        finally:
            run.result.seconds = time.perf_counter() - started
            if checkpoint is not None and run.result.num_steps:
                save_checkpoint(Path(checkpoint), run)
    return run.result


@contextmanager
def _scheduled(objective: Trace_ELBO, schedule: tuple[int, int] | None) -> Iterator[None]:
    """Lets an objective's players take turns as asked, for this fit only."""
    if schedule is None:
        yield
        return
    if not isinstance(objective, Objective):
        raise TypeError(f"{type(objective).__name__} has no two players and takes no schedule")
    own, objective.schedule = objective.schedule, checks.schedule(schedule, objective)
    try:
        yield
    finally:
        objective.schedule = own


class _Run:
    """The state of a fit: parameters as they turn up, one optimizer, the growing result."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: Trace_ELBO,
        batches: Batches,
        optim: type[torch.optim.Optimizer],
        lr: float,
    ) -> None:
        self.model, self.guide, self.objective, self.batches = model, guide, objective, batches
        self.make_optimizer, self.lr = optim, lr
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: dict[str, Tensor] = {}
        self.recorded: dict[tuple[str, str], Tensor] = {}
        self.result = FitResult()

    def loop(self, num_steps: int, *, disable_progbar: bool, **options: Any) -> None:
        todo = range(self.result.num_steps, num_steps)
        with tqdm(
            todo, desc=f"fit {type(self.objective).__name__}", disable=disable_progbar
        ) as bar:
            for step in bar:
                loss = self.step(ema=options["ema"], grad_clip=options["grad_clip"])
                self.after_step(step, options)
                if step % 10 == 0:
                    bar.set_postfix_str(self.describe(loss), refresh=False)

    def after_step(self, step: int, options: dict[str, Any]) -> None:
        if options["validation"] is not None and (step + 1) % options["validate_every"] == 0:
            self.result.validation.append((step + 1, self.evaluate(options["validation"])))
        if options["save"] is not None and (step + 1) % options["save"][1] == 0:
            save_checkpoint(options["save"][0], self)

    def step(self, *, ema: float | None, grad_clip: float | None) -> float:
        self.batches.identify_plates(self.model, self.guide)
        batch, scaling = next(self.batches)
        with poutine.trace(param_only=True) as capture, scaling:
            self._announce_modules()
            loss = (
                self.objective.differentiable_loss(self.model, self.guide, *batch)
                / self.batches.num_rows
            )
        self._collect(capture.trace)
        for p in self.parameters.values():
            p.grad = None
        if loss.requires_grad:
            loss.backward()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), grad_clip)
        if self.optimizer is not None:
            self.optimizer.step()
        self._record(float(loss.detach()), ema)
        return float(loss.detach())

    @torch.no_grad()
    def materialize(self) -> None:
        """Runs the model once so that every parameter exists and has its place in the optimizer."""
        batch, scaling = next(self.batches)
        with poutine.trace(param_only=True) as capture, scaling:
            self.objective.differentiable_loss(self.model, self.guide, *batch)
        self._collect(capture.trace)

    def evaluate(self, data: tuple[Tensor, ...]) -> float:
        kept = dict(getattr(self.objective, "diagnostics", {}))
        with torch.no_grad():
            loss = self.objective.differentiable_loss(self.model, self.guide, *data)
        if kept:
            self.objective.diagnostics = kept
        return float(loss) / len(data[0])

    def describe(self, loss: float) -> str:
        found = getattr(self.objective, "diagnostics", {})
        parts = [
            f"{name} {float(value):.3g}" for site in found.values() for name, value in site.items()
        ]
        return ", ".join([f"loss {loss:.4g}", *parts[:5]])

    def _announce_modules(self) -> None:
        """Tells the objective of parameters optimized although no ``pyro.module`` names them."""
        modules = [m for m in (self.model, self.guide) if isinstance(m, nn.Module)]
        own = {id(p) for m in modules for p in m.parameters()}
        if isinstance(self.objective, Objective):
            self.objective._optimized = frozenset(own)

    def _collect(self, trace: Any) -> None:
        """Adds parameters that turned up for the first time to the optimizer."""
        found = {
            self._local(name): site["value"].unconstrained() for name, site in trace.nodes.items()
        }
        known = {id(p) for p in found.values()}
        for prefix, module in (("model", self.model), ("guide", self.guide)):
            if isinstance(module, nn.Module):
                own = module.named_parameters()
                found |= {
                    f"{prefix}.{n}": p for n, p in own if p.requires_grad and id(p) not in known
                }
        new = {name: p for name, p in found.items() if name not in self.parameters}
        if not new:
            return
        self.parameters |= new
        self.result._parameters = self.parameters
        groups = [{"params": [p], "lr": self.lr * self._boost(name)} for name, p in new.items()]
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(groups, lr=self.lr)  # type: ignore[call-arg]
        else:
            for group in groups:
                self.optimizer.add_param_group(group)

    def _local(self, name: str) -> str:
        """A parameter's name, without the count of objectives where it is this objective's own."""
        for prefix in getattr(self.objective, "parameter_prefixes", ()):
            if name.startswith(prefix):
                return _OWN + name.removeprefix(prefix)
        return name

    def _boost(self, name: str) -> float:
        return 10.0 if name.startswith(_OWN) else 1.0

    @torch.no_grad()
    def _record(self, loss: float, ema: float | None) -> None:
        result = self.result
        result.num_steps += 1
        result.losses.append(loss)
        for site, values in getattr(self.objective, "diagnostics", {}).items():
            for name, value in values.items():
                if value is not self.recorded.get((site, name)):  # not of an earlier player's step
                    curve = f"{site}/{name}"
                    result.diagnostics.setdefault(curve, []).append(float(value))
                    result.diagnostic_steps.setdefault(curve, []).append(result.num_steps)
                    self.recorded[site, name] = value
        if ema is not None:
            for name, p in self.parameters.items():
                if name in result.averaged:
                    result.averaged[name].lerp_(p, 1 - ema)
                else:
                    result.averaged[name] = p.detach().clone()


def _as_tuple(data: Data) -> tuple[Tensor, ...]:
    return (data,) if isinstance(data, Tensor) else tuple(data)


def _no_guide(*args: Any, **kwargs: Any) -> None:
    return None
