r"""The gradient hook that notices when an unknown :math:`\log Z` would bend an answer.

For :math:`p(x\mid\theta) = e^{-U(x,\theta)}/Z(\theta)` every gradient with respect to anything but
:math:`x` needs :math:`\nabla_\theta \log Z(\theta)`. Whether such a gradient is *wanted* cannot be
seen when ``log_prob`` is computed: NUTS over :math:`x` and SVI over a network's weights build the
same graph. It is seen in the backward pass. ``log_prob`` therefore cuts :math:`x` out of the graph
and hooks its result; when autograd arrives there, the hook walks to where *this* backward pass
really delivers gradient other than through :math:`x`, and raises if log Z does not account for it.

Three findings, one error:

* *missing*: log Z is unknown (or stale) and a leaf receives gradient through the potential;
* *not covering*: log Z was given as a constant, and a leaf that moves the potential is not a leaf
  of log Z's own graph;
* *free*: log Z has a leaf that the potential does not have, so that a likelihood would push it to
  minus infinity.

Inside ``SVI.step`` only the parameters that the step will move are counted: a fixed pretrained
prior is legitimate even if its weights were left at ``requires_grad=True``. Not seen: dependences
without an autograd path (discrete or score-function parents, weights of particles), forward-mode
differentiation, user-compiled loops; ``check_model`` sees the first kind.

The hook costs a tenth to a fifth of a Pyro gradient, so it runs on the first 16 calls of each use
and every 64th after that. What tells one use from another is cheap and not perfect; a change that
it does not see is caught within 64 calls.
"""

from __future__ import annotations

import itertools
import types
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_ebm.distributions.call_stack import frame_of, site_being_scored
from pyro_ebm.errors import MissingNormalizerError, MissingNormalizerWarning
from pyro_ebm.settings import missing_normalizer_policy

_Value = TypeVar("_Value", bound="Tensor | None")

FIRST_CALLS = 16
EVERY = 64

_engine_will_run = getattr(torch._C, "_will_engine_execute_node", None)
_calls: dict[tuple[Any, ...], int] = {}
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next_number = itertools.count()

REMEDIES = (
    "Give log Z as a function of these values (log_normalizer=callable, or an energy that knows "
    "its own); learn the energy with an objective made for unnormalized models "
    "(pyro_ebm.infer.NCE, KALE, EnergyDiscrepancy); or, if the energy is meant to be fixed, "
    "freeze it with requires_grad_(False)."
)


def is_available() -> bool:
    """Whether this torch can tell which graph nodes a backward pass will run."""
    return _engine_will_run is not None


def is_due(energy: Any, base: Any, x: Tensor, log_z: Tensor | None) -> bool:
    """Whether this call should be hooked: there will be a graph to walk, and its turn has come."""
    if _engine_will_run is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if missing_normalizer_policy() == "ignore":
        return False
    if len(_calls) > 4096:
        _calls.clear()
    key = (
        _use_of(energy),
        _use_of_base(base),
        x.shape,
        x.requires_grad,
        log_z is None,
        _capture() is not None,
    )
    count = _calls.get(key, 0)
    _calls[key] = count + 1
    return (count < FIRST_CALLS or count % EVERY == 0) and get_proxy_mode() is None


def _use_of(fn: Any) -> tuple[Any, ...]:
    """A cheap signature of an energy and of what in it could receive gradients."""
    if type(fn) is types.FunctionType:
        cells = fn.__closure__ or ()
        return (fn.__code__, *(_mark(c.cell_contents) for c in cells if _is_filled(c)))
    if isinstance(fn, torch.nn.Module):
        return (_identity(fn), *map(_mark, fn._buffers.values()))
    if isinstance(fn, types.MethodType):
        return (*_use_of(fn.__func__), _identity(fn.__self__))
    if isinstance(fn, partial):
        return (_use_of(fn.func), *map(_mark, fn.args), *map(_mark, fn.keywords.values()))
    return (_identity(fn), *map(_mark, getattr(fn, "__dict__", {}).values()))


def _use_of_base(base: Any) -> tuple[Any, ...]:
    """The kind of a base and what in it wants gradients; models build bases at every call."""
    if base is None or isinstance(base, str):
        return (base,)
    held = base.__dict__
    flags = tuple([v.requires_grad for v in held.values() if isinstance(v, Tensor)])
    inner = held.get("base_dist")
    return (type(base), flags) if inner is None else (type(base), flags, _use_of_base(inner))


def _mark(value: Any) -> Any:
    """Whether a tensor wants gradients; which module it is; nothing of other values."""
    if isinstance(value, Tensor):
        return value.requires_grad
    return _identity(value) if isinstance(value, torch.nn.Module) else None


def _identity(thing: Any) -> Any:
    """A number for what was seen before, the type of what is new.

    Many models build an energy at every call: these share the schedule of their type. Unlike an
    address, a number is never given to another object.
    """
    try:
        number = _numbers.get(thing)
        if number is not None:
            return number
        _numbers[thing] = next(_next_number)
    except TypeError:  # unhashable, or without weak references
        pass
    return type(thing)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def watch(
    unnormalized: Tensor,
    x_cut: Tensor,
    log_z: Tensor | None,
    *,
    covers: bool,
    energy: Any,
    why: str,
) -> tuple[Tensor, Tensor | None]:
    """Hooks the unnormalized log density and log Z; call only when :func:`is_due`.

    Args:
        unnormalized: ``-U``, computed from ``x_cut``.
        x_cut: A view of ``x``: its node ends the walk.
        log_z: What is known of log Z, or ``None``.
        covers: Whether log Z is asserted to hold for all parameters (a callable, an exact energy).
        energy: The energy, to name its parameters.
        why: How to describe a missing log Z ("log Z is unknown", "log Z is stale ...").

    Returns:
        ``unnormalized`` and ``log_z`` (a view where it is hooked).
    """
    where = Place(energy, site_being_scored())
    stop = _node_of(x_cut)
    potential_roots = _children(unnormalized)
    if unnormalized.requires_grad and not covers:
        allowed = _graph(_node_of(log_z)) if log_z is not None else set()
        check = partial(_check_covered, potential_roots, stop, allowed, where, why)
        if torch._C._get_tracing_state():
            check(None, everything=True)
        else:
            unnormalized.register_hook(check)
    if log_z is not None and log_z.requires_grad:
        log_z = log_z.view_as(log_z)
        roots = _children(log_z)
        log_z.register_hook(partial(_check_free, roots, potential_roots, stop, where))
    return unnormalized, log_z


def _check_covered(
    roots: tuple[Any, ...],
    stop: tuple[Any, ...],
    allowed: set[Any],
    where: Place,
    why: str,
    _grad: Tensor | None,
    *,
    everything: bool = False,
) -> None:
    reached = _leaves(_graph(roots, stop)) if everything else _walk(roots, stop)
    moved = captured_only([_value_at(n) for n in reached if n not in allowed])
    if moved:
        names = names_of(moved, where.energy)
        report(f"{where}: {why}, but {names} would be inferred through it. {REMEDIES}")


def _check_free(
    roots: tuple[Any, ...],
    potential_roots: tuple[Any, ...],
    stop: tuple[Any, ...],
    where: Place,
    _grad: Tensor,
) -> None:
    known = _graph(potential_roots, stop)
    free = captured_only([_value_at(n) for n in _walk(roots, ()) if n not in known])
    if free:
        names = names_of(free, where.energy)
        report(
            f"{where}: log_normalizer depends on {names} but the energy does not: a likelihood "
            "would push a free log Z to minus infinity. Learn it with an objective that identifies "
            "it (pyro_ebm.infer.NCE, KALE), or hold it fixed."
        )


def report(message: str) -> None:
    """Raises or warns, as the setting ``ebm_missing_normalizer`` says now."""
    policy = missing_normalizer_policy()
    if policy == "error":
        raise MissingNormalizerError(message)
    if policy == "warn":
        warnings.warn(message, MissingNormalizerWarning, stacklevel=2)


def captured_only(tensors: list[_Value]) -> list[_Value]:
    """Keeps the tensors that the ``SVI.step`` in progress will move; all of them outside one."""
    capture = _capture()
    if capture is None:
        return tensors
    sites = capture.trace.nodes.values()
    moved = {id(s["value"].unconstrained()) for s in sites if s["type"] == "param"}
    return [t for t in tensors if id(t) in moved]


def _capture() -> TraceMessenger | None:
    """The handler by which an ``SVI.step`` in progress learns which parameters to move."""
    for handler in _PYRO_STACK:
        if isinstance(handler, TraceMessenger) and handler.param_only:
            return handler
    return None


# --- walking autograd graphs


def _node_of(tensor: Tensor) -> tuple[Any, ...]:
    """The tensor's own node as a root; a leaf's node is its gradient accumulator."""
    if not tensor.requires_grad:
        return ()
    if tensor.grad_fn is not None:
        return (tensor.grad_fn,)
    return (tensor.view_as(tensor).grad_fn.next_functions[0][0],)  # type: ignore[union-attr]


def _children(tensor: Tensor) -> tuple[Any, ...]:
    """Parents in the computation; holding these and not the node makes no reference cycle."""
    if tensor.grad_fn is None:
        return ()
    return tuple(_next(tensor.grad_fn))


def _graph(roots: Iterable[Any], stop: Collection[Any] = ()) -> set[Any]:
    """All nodes reached from ``roots`` without passing a ``stop``."""
    seen: set[Any] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in seen and node not in stop:
            seen.add(node)
            todo += _next(node)
    return seen


def _walk(roots: Iterable[Any], stop: Collection[Any], ends: Collection[Any] = ()) -> Iterator[Any]:
    """Yields where the backward pass in progress delivers gradient without passing a ``stop``.

    These are leaves, ``ends``, and intermediate values that ``autograd.grad(inputs=...)`` asks for:
    a node that runs although nothing behind it does.
    """
    seen: set[Any] = set()
    todo = [n for n in roots if _will_run(n)]
    while todo:
        node = todo.pop()
        if node in stop or node in seen:
            continue
        seen.add(node)
        behind = [n for n in _next(node) if _will_run(n)]
        if node in ends or not behind:
            yield node
        else:
            todo += behind


def _next(node: Any) -> list[Any]:
    return [n for n, _ in node.next_functions if n is not None]


def _will_run(node: Any) -> bool:
    """Whether the pass in progress runs a node; asked of a leaf in ``inputs=`` torch raises."""
    try:
        return _engine_will_run(node)  # type: ignore[misc]
    except RuntimeError:
        return True


def _leaves(nodes: Iterable[Any]) -> list[Any]:
    return [n for n in nodes if hasattr(n, "variable")]


def _value_at(node: Any) -> Tensor | None:
    """The leaf whose gradient a node accumulates; ``None`` for an intermediate value."""
    return getattr(node, "variable", None)


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """Returns every leaf that ``tensor`` depends on and that requires grad."""
    return [n.variable for n in _leaves(_graph(_node_of(tensor)))]


# --- naming things for the message


class Place(NamedTuple):
    """Which energy, at which sample site, an error is about."""

    energy: Any
    site: str | None

    def __str__(self) -> str:
        return f"EBM site {self.site!r}" if self.site else "an EnergyDistribution"


def names_of(tensors: Sequence[Tensor | None], energy: Any) -> str:
    """Names tensors by parameter store, the energy's module or the latents of an MCMC kernel."""
    known = {id(p): f"param {n!r}" for n, p in pyro.get_param_store().named_parameters()}
    if isinstance(energy, torch.nn.Module):
        known |= {id(p): f"parameter {n!r} of the energy" for n, p in energy.named_parameters()}
    frame = frame_of(("potential_grad",))
    if frame is not None and isinstance(frame.f_locals.get("z"), dict):
        known |= {id(v): f"latent {n!r}" for n, v in frame.f_locals["z"].items()}
    names = [known.get(id(t)) or _describe(t) for t in tensors]
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:4]) + (f" and {len(unique) - 4} more" if len(unique) > 4 else "")


def _describe(value: Tensor | None) -> str:
    return "an intermediate value" if value is None else f"a value of shape {tuple(value.shape)}"


# --- factors


def watch_factor(
    value: Tensor,
    inputs: tuple[Tensor, ...],
    where: Place,
    latents: dict[str, Tensor],
    *,
    of_latents: bool,
) -> None:
    """Hooks the value of an energy factor whose ``inputs`` are cut views; only when :func:`is_due`.

    A factor is normalized globally, over its inputs. It may not train a parameter, and unless it is
    ``of_latents`` it may not move a latent either: both would need the log Z that a factor does not
    have.
    """
    ends = {node: site for site, latent in latents.items() for node in _node_of(latent)}
    stop = tuple(node for x in inputs for node in _node_of(x))
    check = partial(_check_factor, _children(value), stop, ends, where, of_latents)
    if value.requires_grad:
        value.register_hook(check)


def _check_factor(
    roots: tuple[Any, ...],
    stop: tuple[Any, ...],
    ends: dict[Any, str],
    where: Place,
    of_latents: bool,  # noqa: FBT001
    _grad: Tensor,
) -> None:
    hits = list(_walk(roots, stop, ends))
    moved = captured_only([_value_at(n) for n in hits if n not in ends])
    names = [] if of_latents else [f"latent {ends[n]!r}" for n in hits if n in ends]
    if moved:
        names = [*names, names_of(moved, where.energy)]
    if names:
        report(factor_problem(where.site, ", ".join(names)))


def factor_problem(site: str | None, names: str) -> str:
    """Returns what is wrong if ``names`` are inferred through an energy factor."""
    return (
        f"energy_factor {site!r}: {names} would be inferred through an energy without its log Z, "
        "since a factor is normalized over its latent inputs only. Use "
        f"pyro.sample({site!r}, EnergyDistribution(...), obs=...) with a log_normalizer or an "
        "objective, or say joint=True if the unnormalized joint density is what you mean"
    )
