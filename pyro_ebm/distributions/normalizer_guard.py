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
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_ebm.distributions.call_stack import Scoring, latents_of_potential, scoring
from pyro_ebm.distributions.moved_parameters import moved_only
from pyro_ebm.distributions.normalizer_functions import problem_of
from pyro_ebm.errors import MissingNormalizerError, MissingNormalizerWarning
from pyro_ebm.ops.autograd_graph import children, graph, leaves, node_of, value_at, walk
from pyro_ebm.settings import missing_normalizer_policy

REMEDIES = (
    "Give log Z as a function of these values (log_normalizer=callable, or an energy that knows "
    "its own); learn the energy with an objective made for unnormalized models "
    "(pyro_ebm.infer.NCE, KALE, EnergyDiscrepancy); or, if the energy is meant to be fixed, "
    "freeze it with requires_grad_(False)."
)
_OF_OBS_MASK = (
    "obs_mask= has made these rows latents: leave them out by poutine.mask(mask=obs_mask) around "
    "the site instead, which is the same posterior of all else."
)


def remedies(where: str) -> str:
    """Returns what can be done about a log Z that is missing.

    Args:
        where: What messages call the site. Pyro imputes what ``obs_mask`` leaves unobserved at a
            site of its own, where no log Z is needed if nothing is imputed.
    """
    return _OF_OBS_MASK if where.endswith("_unobserved'") else REMEDIES


def watch(
    unnormalized: Tensor,
    x_cut: Tensor,
    log_z: Tensor | None,
    *,
    covers: bool,
    energy: Any,
    why: str,
    bounds: Iterable[Tensor] = (),
    done: Callable[[], None] = lambda: None,
    function: Callable[[], Any] | None = None,
    again: Callable[[], Tensor | None] = lambda: None,
) -> tuple[Tensor, Tensor | None]:
    """Hooks the unnormalized log density and log Z; call only when it is their turn.

    Args:
        unnormalized: ``-U``, computed from ``x_cut``.
        x_cut: A view of ``x``: its node ends the walk.
        log_z: What is known of log Z, or ``None``.
        covers: Whether log Z is asserted to hold for all parameters (a callable, an exact energy).
        energy: The energy, to name its parameters.
        why: How to describe a missing log Z ("log Z is unknown", "log Z is stale ...").
        bounds: Tensors that the support is made of: log Z depends on them though U does not.
        done: Called when this call has been looked at.
        function: What log Z comes from, if a user's function.
        again: Calls it once more.

    Returns:
        ``unnormalized`` and ``log_z`` (views where they are hooked).
    """
    now = scoring()
    where = Place(energy, now.site)
    if log_z is None:
        _check_use(now, where, why)
    elif function is not None and unnormalized.requires_grad:
        at = (now.site, x_cut)
        wrong = problem_of(function, log_z, at=at, latents=now.latents, again=again)
        if wrong is not None:
            report(f"{where}: {wrong}.")
    unnormalized = _tied_to(unnormalized, bounds)
    ends = {node: site for site, value in now.latents.items() for node in node_of(value)}
    potential = Paths(children(unnormalized), node_of(x_cut), ends, where)
    if unnormalized.requires_grad and not covers:
        allowed = graph(node_of(log_z)) if log_z is not None else set()
        if torch._C._get_tracing_state():  # no hook survives a trace, so whatever is behind counts
            _check_covered(potential, allowed, why, potential.leaves())
        else:
            unnormalized.register_hook(partial(_look, potential, allowed, why, done))
    else:
        done()
    if log_z is not None and log_z.requires_grad:
        log_z = log_z.view_as(log_z)
        log_z.register_hook(partial(_check_free, children(log_z), potential))
    return unnormalized, log_z


class Paths(NamedTuple):
    """The part of a graph through which a potential depends on anything but ``x``."""

    roots: tuple[Any, ...]
    stop: tuple[Any, ...]
    ends: Mapping[Any, str]
    where: Place

    def reached(self) -> list[Any]:
        """Where the backward pass in progress delivers gradient: latents, else leaves."""
        return list(walk(self.roots, self.stop, self.ends))

    def leaves(self) -> list[Any]:
        """All leaves."""
        return leaves(graph(self.roots, self.stop))

    def names(self, nodes: Iterable[Any]) -> str:
        """Names what of these nodes is being inferred; empty if nothing is."""
        nodes = list(nodes)
        latents = [n for n in nodes if n in self.ends and _is_moved(n)]
        others = moved_only([value_at(n) for n in nodes if n not in self.ends])
        named = [f"latent {self.ends[n]!r}" for n in latents]
        return ", ".join([*named, *([names_of(others, self.where.energy)] if others else [])])


def _is_moved(node: Any) -> bool:
    """Whether a latent's value is moved by the step in progress, or no step says what it moves."""
    behind = [value_at(n) for n in leaves(graph([node]))]
    return not behind or bool(moved_only(behind))


def _tied_to(value: Tensor, bounds: Iterable[Tensor]) -> Tensor:
    """Adds a zero that makes ``value`` depend on ``bounds``, so that gradients lead there."""
    for bound in bounds:
        if bound.requires_grad:
            value = value + (0.0 * bound).nan_to_num(0.0).sum()
    return value


def _check_use(now: Scoring, where: Place, why: str) -> None:
    """Raises where log Z counts whatever gradients say."""
    if now.is_guide:
        report(
            f"{where}: {why}, but a variational factor must be normalized: the ELBO would be off "
            "by log Z. Use a normal or a flow in the guide, or give log_normalizer="
        )
    if isinstance(now.scale, Tensor) and now.scale.requires_grad:
        report(
            f"{where}: {why}, but poutine.scale multiplies it with a scale that is inferred, which "
            f"log Z would weigh. {REMEDIES}"
        )


def _look(
    potential: Paths, allowed: set[Any], why: str, done: Callable[[], None], _grad: Tensor
) -> None:
    done()
    _check_covered(potential, allowed, why, potential.reached())


def _check_covered(potential: Paths, allowed: set[Any], why: str, reached: Iterable[Any]) -> None:
    names = potential.names(n for n in reached if n not in allowed)
    if names:
        report(
            f"{potential.where}: {why}, but {names} would be inferred through it. "
            f"{remedies(str(potential.where))}"
        )


def _check_free(roots: tuple[Any, ...], potential: Paths, _grad: Tensor) -> None:
    known = graph(potential.roots, potential.stop)
    of_log_z = Paths(roots, (), {}, potential.where)
    names = of_log_z.names(n for n in of_log_z.reached() if n not in known)
    if names:
        report(
            f"{potential.where}: log_normalizer depends on {names} but the energy does not: a "
            "likelihood would push a free log Z to minus infinity. Learn it with an objective that "
            "identifies it (pyro_ebm.infer.NCE, KALE), or hold it fixed."
        )


def report(message: str) -> None:
    """Raises or warns, as the setting ``ebm_missing_normalizer`` says now."""
    policy = missing_normalizer_policy()
    if policy == "error":
        raise MissingNormalizerError(message)
    if policy == "warn":
        warnings.warn(message, MissingNormalizerWarning, stacklevel=2)


def report_mixture(mixture: str) -> None:
    """Raises or warns: the components of a mixture are weighed by their own log Z."""
    report(
        f"{Place(None, scoring().site)}: log Z is unknown, but {mixture} adds densities, "
        "which weighs its components by their log Z even where only x is inferred. Give "
        "log_normalizer=, with one value per component, or put the mixture into one energy."
    )


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
    known |= {id(v): f"latent {n!r}" for n, v in latents_of_potential().items()}
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
    done: Callable[[], None],
) -> None:
    """Hooks the value of an energy factor whose ``inputs`` are cut views, when it is its turn.

    A factor is normalized globally, over its inputs. It may not train a parameter, and unless it is
    ``of_latents`` it may not move a latent either: both would need the log Z that a factor does not
    have.
    """
    ends = {node: site for site, latent in latents.items() for node in node_of(latent)}
    stop = tuple(node for x in inputs for node in node_of(x))
    if value.requires_grad:
        paths = Paths(children(value), stop, ends, where)
        value.register_hook(partial(_check_factor, paths, of_latents, done))
    else:
        done()


def _check_factor(
    paths: Paths,
    of_latents: bool,  # noqa: FBT001
    done: Callable[[], None],
    _grad: Tensor,
) -> None:
    done()
    reached = paths.reached()
    names = paths.names(n for n in reached if not (of_latents and n in paths.ends))
    if names:
        report(factor_problem(paths.where.site, names))


def factor_problem(site: str | None, names: str) -> str:
    """Returns what is wrong if ``names`` are inferred through an energy factor."""
    return (
        f"energy_factor {site!r}: {names} would be inferred through an energy without its log Z, "
        "since a factor is normalized over its latent inputs only. Use "
        f"pyro.sample({site!r}, EnergyDistribution(...), obs=...) with a log_normalizer or an "
        "objective, or say joint=True if the unnormalized joint density is what you mean"
    )
