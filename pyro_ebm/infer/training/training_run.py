"""A training in progress: parameters as they turn up, one optimizer, the growing result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from pyro_ebm.infer.training import divergence
from pyro_ebm.infer.training.captured_step import CapturedStep, check_replayable
from pyro_ebm.infer.training.checkpoint import save_checkpoint
from pyro_ebm.infer.training.early_stopping import EarlyStopping, check_criterion, checked_value
from pyro_ebm.infer.training.fit_options import Options
from pyro_ebm.infer.training.fit_result import FitResult
from pyro_ebm.infer.training.held_out import HeldOutLoss, held_out
from pyro_ebm.infer.training.interrupts import Interrupts
from pyro_ebm.infer.training.minibatch import Batches, Plates
from pyro_ebm.infer.training.optimizers import new_optimizer
from pyro_ebm.infer.training.run_modules import modules_of
from pyro_ebm.infer.training.run_settings import settings_of
from pyro_ebm.infer.training.run_state import restore, state_of
from pyro_ebm.infer.training.stock_elbo import Loss, StockELBO, as_given, objectives_of
from pyro_ebm.ops.module_calls import noting_calls

_OWN = "log_normalizer of "
_PLATEAU = ReduceLROnPlateau.__name__
_UNDECAYED = {"weight_decay": 0.0}  # log Z is as large as it is: shrinking it bends the energy


class TrainingRun:
    """The state of a fit.

    Args:
        model: The model.
        guide: Its guide.
        objective: The loss.
        batches: Mini-batches.
        options: How to train.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: Loss,
        batches: Batches,
        options: Options,
    ) -> None:
        self.model, self.guide, self.objective, self.batches = model, guide, objective, batches
        self.options = options
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self.stopping = None if options.patience is None else EarlyStopping(options.patience)
        self.parameters: dict[str, Tensor] = {}
        self.groups: list[list[str]] = []
        self.called: list[nn.Module] = []
        self.num_steps = 0
        self.plates = Plates()
        self.settings = settings_of(
            objective,
            options.optim,
            options.lr,
            batches.batch_size,
            ema=options.ema,
            grad_clip=options.grad_clip,
            criterion=options.criterion,
        )
        self.result = FitResult()
        self._criterion = self._new_criterion()
        self._recorded: dict[tuple[str, str], Tensor] = {}
        self._seen: set[str] = set()
        self._captured = self._new_capture()

    @property
    def is_over(self) -> bool:
        """Whether the patience is exhausted."""
        return self.stopping is not None and self.stopping.is_over

    def loop(self, num_steps: int) -> None:
        """Trains until so many steps are done in all, or patience is exhausted."""
        self.num_steps, todo = num_steps, range(self.result.num_steps, num_steps)
        hidden = self.options.disable_progbar
        name = f"fit {type(as_given(self.objective)).__name__}"
        with Interrupts() as interrupts, tqdm(todo, desc=name, disable=hidden) as bar:
            for step in bar:
                if self.is_over:
                    break
                loss = self.step()
                self._after_step(step + 1)
                if not hidden and step % 10 == 0:
                    bar.set_postfix_str(self._describe(loss), refresh=False)
                interrupts.let_through()

    # --- one step

    def step(self) -> float:
        """Draws a batch, moves the parameters, and returns the loss per datum.

        Raises:
            NonFiniteEnergyError: If the loss or a gradient is not finite; nothing has moved then.
            ValueError: If there is nothing to train.
        """
        torch.clear_autocast_cache()  # an autocast around the whole fit keeps the first weights
        self.batches.identify_plates(self.model, self.guide)
        loss = float(self._loss_and_grads(*next(self.batches)))
        self._check_trains()
        self._move(loss)
        self._record(loss)
        return loss

    def _loss_and_grads(self, batch: tuple[Tensor, ...], scaling: Any) -> Tensor:
        """Deposits gradients, those of a resting player as ``None``, and returns the loss."""
        if self._captured is None or not self.parameters:
            return self._backward(batch, scaling)
        if self._may_be_the_last():
            self._captured.look_again()
        replayed = self._captured.replay(batch, self.parameters)
        if replayed is not None:
            for p, grad in zip(self.parameters.values(), replayed.grads, strict=True):
                p.grad = grad
            return replayed.loss
        with self._captured.compared(batch, scaling, self.parameters, modules_of(self)) as taken:
            loss = taken.loss = self._backward(batch, scaling)
        return loss

    def _may_be_the_last(self) -> bool:
        """Whether the run may end with the step in progress, by its number or by patience."""
        step = self.result.num_steps + 1
        is_point = step % self.options.validate_every == 0
        return step == self.num_steps or (self.stopping is not None and is_point)

    def _backward(self, batch: tuple[Tensor, ...], scaling: Any) -> Tensor:
        loss = self._loss(batch, scaling)
        for p in self.parameters.values():
            p.grad = None
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def _loss(self, batch: tuple[Tensor, ...], scaling: Any) -> Tensor:
        """The loss per datum on a batch; parameters met for the first time are taken in."""
        watched = self._watched() if not self.parameters else nullcontext()
        with poutine.trace(param_only=True) as capture, scaling, watched:
            own = self._announce_modules()
            loss = self.objective.differentiable_loss(self.model, self.guide, *batch)
        self._collect(capture.trace, own)
        return loss / self.batches.num_rows

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Notes which modules the model calls, and its plates."""
        with noting_calls(self.called), self.plates:
            yield

    def _check_trains(self) -> None:
        """Raises ``ValueError`` if there is neither a parameter nor a log Z that is learned."""
        parts = objectives_of(self.objective)
        if self.optimizer is None and not any(part.log_normalizers for part in parts):
            raise ValueError(
                "there is nothing to train: model, guide and objective have no parameter that "
                "requires gradients. Was the network frozen, as for sampling? Call "
                "network.requires_grad_(True).train() before fit"
            )

    def _move(self, loss: float) -> None:
        step = self.result.num_steps + 1
        divergence.check_loss(loss, step, self.objective)
        divergence.check_gradients(self.parameters, step, self.objective)
        if self.options.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.options.grad_clip)
        if self.optimizer is not None:
            self.optimizer.step()
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()

    @torch.no_grad()
    def materialize(self) -> None:
        """Runs the model once so that every parameter exists and has its place in the optimizer."""
        with self._unnoted():
            self._loss(*next(self.batches))

    def _new_criterion(self) -> Callable[[], Any] | None:
        """What a validation point evaluates: the user's criterion, else the held-out loss."""
        rows, criterion = self.options.validation, self.options.criterion
        if criterion is not None or rows is None:
            return criterion
        return HeldOutLoss(self.objective, self.model, self.guide, rows, self.batches)

    @property
    def _reader(self) -> str | None:
        """What goes by the curve of the criterion, if anything does."""
        if self.stopping is not None:
            return "patience"
        return _PLATEAU if isinstance(self.scheduler, ReduceLROnPlateau) else None

    def _new_capture(self) -> CapturedStep | None:
        options, objective = self.options, self.objective
        if not (options.capture or options.compile):
            return None
        if isinstance(objective, StockELBO):
            who = type(objective.elbo).__name__
            raise TypeError(f"fit(capture=True) replays the steps of an Objective, got {who}")
        check_replayable(objective, "fit(capture=True)")
        return CapturedStep(
            objective,
            self.model,
            self.guide,
            self.batches.num_rows,
            called=self.called,
            compile=options.compile,
        )

    def _announce_modules(self) -> dict[str, Tensor]:
        """Tells the objective of parameters optimized although no ``pyro.module`` names them."""
        modules = {"model": self.model, "guide": self.guide}
        own: dict[str, Tensor] = {
            f"{prefix}.{name}": p
            for prefix, module in modules.items()
            if isinstance(module, nn.Module)
            for name, p in module.named_parameters()
        }
        self.objective.optimized = frozenset(map(id, own.values()))
        return own

    # --- parameters

    def _collect(self, trace: Any, own: dict[str, Tensor]) -> None:
        """Adds parameters that turned up for the first time to the optimizer.

        A tensor with several names goes by the first one.
        """
        if self._seen.issuperset(trace.nodes) and self._seen.issuperset(own):
            return
        self._seen.update(trace.nodes, own)
        found = {
            self._local(name): site["value"].unconstrained() for name, site in trace.nodes.items()
        }
        found |= {name: p for name, p in own.items() if p.requires_grad}
        names = {id(p): name for name, p in reversed([*self.parameters.items(), *found.items()])}
        new = {name: p for name, p in found.items() if names[id(p)] == name}
        new = {name: p for name, p in new.items() if name not in self.parameters}
        if new:
            self.parameters |= new
            self.result.parameters = self.parameters
            self._optimize(new)

    def _optimize(self, new: Iterable[str]) -> None:
        """Hands parameters to the optimizer, in one group for each learning rate."""
        by_rate: dict[float, list[str]] = {}
        for name in new:
            by_rate.setdefault(self._boost(name), []).append(name)
        if self.scheduler is not None:
            raise ValueError(
                f"parameters {sorted(new)} turned up at step {self.result.num_steps + 1}, when the "
                "learning-rate schedule had been made for the others: let the model use all of "
                "them from the first step, or leave lr_schedule out"
            )
        self._add_groups([*by_rate.values()])

    def _add_groups(self, groups: list[list[str]]) -> None:
        options = self.options
        made = [
            {
                "params": [self.parameters[name] for name in names],
                "lr": options.lr * self._boost(names[0]),
                **(_UNDECAYED if names[0].startswith(_OWN) else {}),
            }
            for names in groups
        ]
        self.groups += groups
        if self.optimizer is not None:
            for group in made:
                self.optimizer.add_param_group(group)
            return
        self.optimizer = new_optimizer(options.optim, made, options.lr)
        if options.lr_schedule is not None:
            self.scheduler = options.lr_schedule(self.optimizer)
            if isinstance(self.scheduler, ReduceLROnPlateau):
                check_criterion(self.objective, options, _PLATEAU)

    def regroup(self, groups: list[list[str]]) -> None:
        """Makes the optimizer anew for groups in the order in which they once turned up."""
        self.optimizer, self.scheduler, self.groups = None, None, []
        self._add_groups(groups)

    def _local(self, name: str) -> str:
        """A parameter's name, without the count of objectives where it is this objective's own."""
        for prefix in self.objective.parameter_prefixes:
            if name.startswith(prefix):
                return _OWN + name.removeprefix(prefix)
        return name

    def _boost(self, name: str) -> float:
        return 10.0 if name.startswith(_OWN) else 1.0

    # --- after a step

    def _after_step(self, step: int) -> None:
        options, losses = self.options, self.result.losses
        if self.result.diverged is None and divergence.is_running_away(losses):
            self.result.diverged = step
            divergence.warn_running_away(losses, self.objective)
        if isinstance(self._criterion, HeldOutLoss) and not self._criterion.is_prepared:
            with held_out(modules_of(self).values()):  # what it refuses, it refuses at once
                self._criterion.prepare(self.plates.full_sizes, self._reader)
        if self._criterion is not None and step % options.validate_every == 0:
            self._validate(step)
        if options.checkpoint is not None and step % options.checkpoint_every == 0:
            self.save()

    def _validate(self, step: int) -> None:
        with held_out(modules_of(self).values()):
            value = checked_value(self._criterion(), step)  # type: ignore[misc]
        self.result.validation.append((step, value))
        if self.stopping is not None:
            self.stopping.see(step, value, lambda: deepcopy(state_of(self)))
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(value)
        if self._captured is not None:
            self._captured.look_again()  # a criterion is the user's code

    def save(self) -> None:
        """Writes the checkpoint; parameters that are not finite do not replace good ones."""
        path = self.options.checkpoint
        if path is None or not self.result.num_steps:
            return
        if not path.exists() or divergence.are_finite(self.parameters):
            save_checkpoint(path, self)

    @torch.no_grad()
    def _record(self, loss: float) -> None:
        result = self.result
        result.num_steps += 1
        result.losses.append(loss)
        for site, values in self.objective.diagnostics.items():
            for name, value in values.items():
                if value is not self._recorded.get((site, name)):  # not of another player's step
                    curve = f"{site}/{name}"
                    result.diagnostics.setdefault(curve, []).append(float(value))
                    result.diagnostic_steps.setdefault(curve, []).append(result.num_steps)
                    self._recorded[site, name] = value
        if self.options.ema is not None:
            self._average(self.options.ema)

    def _average(self, decay: float) -> None:
        """Moves the averages: of all steps so far, each weighing ``decay`` of the one after it."""
        averaged = self.result.averaged
        weight = (1 - decay) / (1 - decay**self.result.num_steps)
        for name, p in self.parameters.items():
            if name in averaged:
                averaged[name].lerp_(p, weight)
            else:
                averaged[name] = p.detach().clone()

    @contextmanager
    def _unnoted(self) -> Iterator[None]:
        """Keeps what is noted in a run that is no training step out of the curves."""
        parts = objectives_of(self.objective)
        kept = [dict(part.diagnostics) for part in parts]
        try:
            yield
        finally:
            for part, notes in zip(parts, kept, strict=True):
                part.diagnostics = notes

    def _describe(self, loss: float) -> str:
        sites = self.objective.diagnostics.values()
        parts = [f"{name} {float(value):.3g}" for site in sites for name, value in site.items()]
        if self.result.validation:
            parts.insert(0, f"held out {self.result.validation[-1][1]:.4g}")
        return ", ".join([f"loss {loss:.4g}", *parts[:5]])

    # --- the best point

    def finish(self) -> None:
        """Goes back to the best point, if one was kept."""
        if self.stopping is None or self.stopping.best is None:
            return
        restore(self.stopping.state, self)
        self.result.best, self.result.stopped_early = self.stopping.best, self.is_over
