"""A training step's loss and gradients as a graph: recorded once, replayed without Python.

A step through Pyro goes through handlers and checks in Python, which a small network's forward and
backward pass does not outweigh. ``make_fx`` records the tensor operations of one step, random
draws and gradients included; replaying them gives the same numbers and uses the random generator
alike. Parameters and buffers are live in the graph, Python numbers are frozen in it.

Steps whose number is a power of two are not replayed: there the objective looks closely at the
model, and the graph is compared with what it stands for: loss, gradients, and the objective's
state. So it is after every point of the training at which the user's code is called, and at its
end. Where they differ, or where values are read by Python (``if x.mean() > 0``), training goes on
step by step, with a warning that says why, and which steps nothing has vouched for. What is frozen,
and which modules are in training mode, is looked at in every step: each has a graph of its own. So
is whether data are finite and on their support, and the loss a number: the step itself says what is
wrong where they are not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pyro
import torch
from pyro.distributions.util import is_identically_zero
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    make_fx,
)

from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.scoring.surrogate_elbo import SurrogateELBO
from pyro_ebm.infer.training.stock_elbo import objectives_of
from pyro_ebm.ops.graph_memory import separate_outputs
from pyro_ebm.ops.graph_recording import ConstantReads, collecting_conditions
from pyro_ebm.ops.graph_simplification import simplify
from pyro_ebm.ops.powers_of_two import is_power_of_two
from pyro_ebm.ops.rng import rng_preserved

Batch = tuple[Tensor, ...]
FIRST = 3  # the step, counted from 0, from which graphs are recorded
UNITS = 1000.0  # by so many units in the last place a graph may differ
ROUNDING = (
    1e-3  # by so much, and so large a share, may numbers that sum up what compiled steps noted
)


class Pass:
    """What one step computes.

    Args:
        loss: Loss per datum, 0-d.
        holds: Whether the graph's conditions are met, 0-d.
        grads: Gradients in the order of the parameters, ``None`` where there is none.
        notes: The objective's diagnostics.
    """

    def __init__(
        self,
        loss: Tensor,
        holds: Tensor,
        grads: list[Tensor | None],
        notes: dict[str, dict[str, Tensor]],
    ) -> None:
        self.loss, self.holds, self.grads, self.notes = loss, holds, grads, notes

    @property
    def is_sound(self) -> bool:
        """Whether there is nothing that the step itself would complain of."""
        return bool(self.holds) and math.isfinite(self.loss)

    def tensors(self) -> list[Tensor]:
        """Returns all of them, flat."""
        notes = [value for site in self.notes.values() for value in site.values()]
        return [self.loss, self.holds, *[g for g in self.grads if g is not None], *notes]

    def refilled(self, values: list[Tensor]) -> Pass:
        """Returns a pass of the same structure with other values, in the order of ``tensors``."""
        flat = iter(values)
        loss, holds = next(flat), next(flat)
        grads = [g if g is None else next(flat) for g in self.grads]
        notes = {site: {name: next(flat) for name in own} for site, own in self.notes.items()}
        return Pass(loss, holds, grads, notes)


class Taken:
    """A step that is taken as it is; who takes it fills in the loss per datum."""

    loss: float | Tensor = math.nan


class CapturedStep:
    """Replays the steps of one objective on one model.

    Args:
        objective: The loss.
        model: The model.
        guide: Its guide.
        num_rows: Rows of the whole data set, by which the loss is divided.
        called: Modules that the model calls, beside those that are handed over with a step.
        compile: Whether to hand graphs to ``torch.compile``.
        user: Who replays them, for messages.
        instead: What trains without graphs, for messages.
    """

    def __init__(
        self,
        objective: SurrogateELBO,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        num_rows: int,
        *,
        called: Sequence[nn.Module] = (),
        compile: bool,  # noqa: A002
        user: str = "fit(capture=True)",
        instead: str = "capture=False",
    ) -> None:
        self.objective, self.model, self.guide = objective, model, guide
        self.num_rows, self.called, self.compile = num_rows, called, compile
        self.user, self.instead = user, instead
        self.is_given_up = False
        self._graphs: dict[Any, tuple[Callable[..., Any], Pass]] = {}
        self._agreed: set[Any] = set()
        self._unsure: dict[Any, tuple[int, int]] = {}
        self._parts: list[nn.Module] = []
        self._weights: list[Tensor] = []

    def look_again(self) -> None:
        """Takes the next step of every graph as it is, to compare the graph with it."""
        self._agreed.clear()

    def replay(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Pass | None:
        """Returns this step by its graph, or ``None`` if it has to be taken as it is."""
        if is_power_of_two(int(self.objective.num_steps_taken)):
            self.look_again()
        key = self._key(batch, parameters)
        if self.is_given_up or key not in self._agreed:
            return None
        found = self._run(key, batch)
        if not found.is_sound:
            return None
        step = int(self.objective.num_steps_taken) + 1
        self._unsure[key] = (self._unsure.get(key, (step, step))[0], step)
        self.objective.diagnostics = self.objective.diagnostics | found.notes
        self._judge(found)
        self.objective.count_step()
        return found

    @contextmanager
    def compared(
        self,
        batch: Batch,
        scaling: Any,
        parameters: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
    ) -> Iterator[Taken]:
        """Surrounds a step that is taken as it is, and compares the graph with it.

        A graph is recorded first where there is none.
        """
        taken = Taken()
        if self.is_given_up or int(self.objective.num_steps_taken) < FIRST:
            yield taken
            return
        self._watch([*modules.values(), *self.called])
        key, kept = self._key(batch, parameters), self._switches(parameters)
        is_new = key not in self._graphs
        try:
            with self._unchanged(modules):
                if is_new:
                    self._graphs[key] = self._record(batch, scaling, list(parameters.values()))
            with self._unchanged(modules):
                replayed = self._run(key, batch)
                if replayed.is_sound:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # the step itself will say it
                        self._judge(replayed)
                state = self._state(modules)
        except Exception as error:  # models, recorder and compiler may fail in any way
            self._give_up(str(error).splitlines()[0] if str(error) else type(error).__name__)
            yield taken
            return
        yield taken
        if self._switches(parameters) != kept:  # in this step: the graph stands for neither
            del self._graphs[key]
            if not is_new and key in self._unsure:
                self._give_up("the model has other parameters than before, or has frozen some")
            return
        if not replayed.is_sound:  # it would never be taken from a graph
            self._give_up("its data are off the support, or its loss is no number")
            return
        grads = [p.grad for p in parameters.values()]
        if not _agree(replayed.grads, grads) or not self._same(state, self._state(modules)):
            self._give_up("its gradients or its state are not those of the step itself")
            return
        if not self._same_loss(replayed.loss, taken.loss, batch):
            self._give_up("its loss is not that of the step itself")
            return
        self._agreed.add(key)
        self._unsure.pop(key, None)

    def _judge(self, found: Pass) -> None:
        for site, notes in found.notes.items():
            self.objective.objective_of(site).judge(site, notes, trains=True)

    def _key(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Any:
        shapes = tuple((t.shape, t.dtype, t.device) for t in batch)
        turns = tuple(part.is_second_players_turn for part in objectives_of(self.objective))
        return (shapes, turns, self._switches(parameters))

    def _switches(self, parameters: Mapping[str, Tensor]) -> Any:
        """What is trained, what is frozen, and which modules are in training mode."""
        weights = [*parameters.values(), *self._weights]
        trained = tuple(map(id, parameters.values()))
        modes = [part.training for part in self._parts]
        return (trained, *[p.requires_grad for p in weights], *modes)

    def _watch(self, modules: Iterable[nn.Module]) -> None:
        self._parts = [part for module in modules for part in module.modules()]
        self._weights = [p for part in self._parts for p in part.parameters(recurse=False)]

    def _run(self, key: Any, batch: Batch) -> Pass:
        graph, structure = self._graphs[key]
        with torch.no_grad():
            return structure.refilled(graph(*batch))

    # --- recording

    def _record(
        self, batch: Batch, scaling: Any, parameters: list[Tensor]
    ) -> tuple[Callable[..., Any], Pass]:
        if self.objective.enumerates:
            raise NotImplementedError("sites are enumerated")
        structure: list[Pass] = []

        def step(*batch: Tensor) -> list[Tensor]:
            with _Reads(), scaling, pyro.validation_enabled(is_validate=False):
                structure.append(self._pass(batch, parameters))
            return structure[-1].tensors()

        graph: GraphModule = make_fx(step)(*batch)
        simplify(graph)
        separate_outputs(graph)  # gradients are scaled and clipped in place
        if not self.compile:
            return graph.forward, structure[-1]
        return torch.compile(graph, options={"fallback_random": True}), structure[-1]

    def _pass(self, batch: Batch, parameters: list[Tensor]) -> Pass:
        self.objective.diagnostics = {}
        with collecting_conditions() as conditions:
            traces = list(self.objective._get_traces(self.model, self.guide, batch, {}))
        particles: Any = self.objective.num_particles
        elbo = torch.stack([_differentiable_elbo(*pair) for pair in traces]).sum() / particles
        loss = -elbo / self.num_rows
        moved = [p for p in parameters if p.requires_grad]
        found = torch.autograd.grad(loss, moved, allow_unused=True)
        grads = {id(p): _laid_out(g, p) for p, g in zip(moved, found, strict=True)}
        ordered = [grads.get(id(p)) for p in parameters]
        notes = {site: dict(own) for site, own in self.objective.diagnostics.items()}
        holds = torch.ones((), dtype=torch.bool, device=loss.device)
        for condition in conditions:  # none where all EBM sites are latent
            holds = holds & condition.to(loss.device)
        return Pass(loss.detach(), holds, ordered, notes)

    # --- the state that a step may change

    def _state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        state = deepcopy(dict(self.objective.state_dict()))
        counts = [name for name in state if name.endswith("num_steps_taken")]
        for name in counts:
            del state[name]
        buffers = {k: b.clone() for m in modules.values() for k, b in m.named_buffers()}
        return {"objective": state, "buffers": buffers}

    @contextmanager
    def _unchanged(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """After the block, objective, buffers and random generators are as before."""
        state = deepcopy(self.objective.state_dict())
        buffers = [(b, b.clone()) for m in modules.values() for b in m.buffers()]
        notes = self.objective.diagnostics
        parts = objectives_of(self.objective)
        seen = [deepcopy((part.separations, part.means)) for part in parts]
        try:
            with rng_preserved():
                yield
        finally:
            with torch.no_grad():
                self.objective.load_state_dict(state)
                for buffer, kept in buffers:
                    buffer.copy_(kept)
            self.objective.diagnostics = notes
            for part, (separations, means) in zip(parts, seen, strict=True):
                part.separations, part.means = separations, means

    def _same(self, ours: Any, theirs: Any) -> bool:
        """Whether two nested states agree, tensors up to rounding, and so numbers if compiled."""
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            return ours.shape == theirs.shape and _close(ours, theirs)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            return ours.keys() == theirs.keys() and all(
                self._same(ours[k], theirs[k]) for k in ours
            )
        if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
            return len(ours) == len(theirs) and all(map(self._same, ours, theirs))
        if self.compile and isinstance(ours, float) and isinstance(theirs, float):
            return math.isclose(ours, theirs, rel_tol=ROUNDING, abs_tol=ROUNDING)
        return type(ours) is type(theirs) and bool(ours == theirs)

    def _same_loss(self, ours: Tensor, theirs: float | Tensor, batch: Batch) -> bool:
        """Whether two losses agree, in units of one nat for each row of the batch."""
        rows = max((len(t) for t in batch if t.dim()), default=1)
        one, other = float(ours), float(theirs)
        eps = torch.finfo(ours.dtype).eps
        bound = max(abs(other), rows / self.num_rows) * (ROUNDING if self.compile else UNITS * eps)
        return abs(one - other) <= bound or one == other or math.isnan(one) and math.isnan(other)

    def _give_up(self, why: str) -> None:
        self.is_given_up = True
        self._graphs.clear()
        warnings.warn(
            f"{self.user}: the steps of {type(self.objective).__name__} cannot be replayed "
            f"from a graph ({why}), so that they are taken one by one from here on. "
            f"{self._on_the_past()}Use torch.where in place of branches on values and tensors in "
            "place of Python numbers that change",
            SurrogateWarning,
            stacklevel=2,
        )

    def _on_the_past(self) -> str:
        """What is to be said of the steps replayed since a graph was last seen to be right."""
        if not self._unsure:
            return ""
        starts, ends = zip(*self._unsure.values(), strict=True)
        return (
            f"Steps {min(starts)} to {max(ends)} were replayed since it was last compared, and may "
            f"be those of a model that had changed by then: train anew with {self.instead}. "
        )


def check_replayable(objective: SurrogateELBO, user: str) -> None:
    """Raises ``ValueError`` for objectives whose steps are of several kinds.

    Args:
        objective: The loss.
        user: Who would replay them, for the message.
    """
    if not objective.is_replayable:
        raise ValueError(
            f"{user} replays one step over and over, and {type(objective).__name__} as it was made "
            "decides from step to step what to do (refit_every, throttle): train without graphs"
        )


def _differentiable_elbo(model_trace: Any, guide_trace: Any) -> Tensor:
    """The ELBO as a tensor whose value and gradient are both right."""
    total: Any = 0.0
    for site in model_trace.nodes.values():
        if site["type"] == "sample":
            total = total + site["log_prob_sum"]
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample":
            _, score_function, entropy = site["score_parts"]
            if not is_identically_zero(score_function):
                raise NotImplementedError(f"guide site {name!r} is not reparametrized")
            total = total - entropy.sum() if isinstance(entropy, Tensor) else total - entropy
    return total


def _laid_out(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient in the memory layout of its parameter, which fused optimizers take for granted."""
    if grad is None or grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def _agree(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    """Whether gradients agree; some are rounding alone, so that all are measured by the largest."""
    if [g is None for g in ours] != [g is None for g in theirs]:
        return False
    flat = [
        torch.cat([g.flatten() for g in s if g is not None] or [torch.zeros(0)])
        for s in (ours, theirs)
    ]
    return flat[0].shape == flat[1].shape and _close(*flat)


def _close(one: Tensor, other: Tensor) -> bool:
    if not other.is_floating_point() or not other.numel():
        return bool(torch.equal(one, other))
    size = torch.where(other.isfinite(), other, 0.0).abs().amax()
    near = (one - other).abs() <= UNITS * torch.finfo(other.dtype).eps * size
    return bool((near | (one == other) | (one.isnan() & other.isnan())).all())


class _Reads(ConstantReads):
    """Takes it for granted, too, that values lie in a distribution's support.

    A distribution made with validation on asks it, and every step that is not replayed answers.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._is_all_true.default:
            with disable_proxy_modes_tracing():
                return torch.ones((), dtype=torch.bool, device=args[0].device)
        return super().__torch_dispatch__(func, types, args, kwargs)
