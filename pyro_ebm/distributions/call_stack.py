"""Reading the call stack for the few facts that Pyro does not pass on.

Pyro scores a site, draws a prototype or predicts without telling the distribution which of these it
is doing. Searches are for rare paths (an error or a warning is due, a scheduled check runs); only
the look at the immediate caller is cheap enough for every call.

The names are those of Pyro's functions. What our own functions do they say themselves, as by
:func:`prototype_run`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

from pyro.distributions import ZeroInflatedDistribution
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import MixtureSameFamily

SCORING = ("compute_log_prob", "log_prob_sum", "compute_score_parts")
SETTING_UP = ("_guess_max_plate_nesting", "initialize_model", "_setup_prototype")
ELBO = ("get_importance_trace", "_get_trace", "_guess_max_plate_nesting")
PREDICTIVE_IN_SEQUENCE = ("_predictive_sequential",)
PREDICTIVE = ("_predictive", *PREDICTIVE_IN_SEQUENCE)
POTENTIAL = ("potential_grad",)

_is_our_prototype: ContextVar[bool] = ContextVar("is_our_prototype", default=False)

_MIXTURES = {
    kind.log_prob.__code__: kind.__name__ for kind in (MixtureSameFamily, ZeroInflatedDistribution)
}


def _frame_of(functions: tuple[str, ...], depth: int = 40) -> FrameType | None:
    """The frame of one of these functions that is nearest to our caller, ``depth`` frames up."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(depth):
        if frame is None or frame.f_code.co_name in functions:
            return frame
        frame = frame.f_back
    return None


class Scoring(NamedTuple):
    """The sample site whose ``log_prob`` Pyro is computing.

    Args:
        site: Its name; ``None`` outside of Pyro.
        scale: What its log density is multiplied with.
        is_guide: Whether it is a variational factor.
        latents: Values of the trace's other sites that gradients may reach, by name.
    """

    site: str | None = None
    scale: Any = 1.0
    is_guide: bool = False
    latents: Mapping[str, Tensor] = {}


def scoring() -> Scoring:
    """Returns the site being scored, from the frame in which Pyro does it."""
    frame = _frame_of(SCORING, depth=10)
    trace = frame.f_locals.get("self") if frame is not None else None
    if frame is None or not isinstance(trace, Trace) or "name" not in frame.f_locals:
        return Scoring()
    name, is_guide = frame.f_locals["name"], frame.f_code.co_name == "compute_score_parts"
    values = {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and n != name}
    latents = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.requires_grad}
    return Scoring(name, trace.nodes[name]["scale"], is_guide, latents)


@contextmanager
def prototype_run() -> Iterator[None]:
    """Surrounds runs of a model whose draws are no answers: what they are good for is not told."""
    token = _is_our_prototype.set(True)
    try:
        yield
    finally:
        _is_our_prototype.reset(token)


def is_prototype_run() -> bool:
    """Whether the model is run only to learn its shapes: MCMC or guide set-up, a check of ours."""
    return _is_our_prototype.get() or _frame_of(SETTING_UP) is not None


def is_inside_elbo() -> bool:
    """Whether a step of an ELBO scores the model, or the run in which it counts the plates."""
    return _frame_of(ELBO) is not None


def is_sequential_predictive() -> bool:
    """Whether ``Predictive`` runs the model once per draw."""
    return _frame_of(PREDICTIVE_IN_SEQUENCE) is not None


def given_to_predictive() -> Mapping[str, Tensor] | None:
    """Returns the draws that ``Predictive`` conditions the model on; ``None`` outside of it."""
    frame = _frame_of(PREDICTIVE)
    return None if frame is None else frame.f_locals.get("posterior_samples", {})


def latents_of_potential() -> Mapping[str, Tensor]:
    """Returns the values in which Pyro's integrator differentiates a potential, by latent."""
    frame = _frame_of(POTENTIAL)
    values = None if frame is None else frame.f_locals.get("z")
    return values if isinstance(values, dict) else {}


def caller_weighing_components() -> str | None:
    """Returns the name of the mixture whose ``log_prob`` called ours, by way of others or not.

    To be called from ``EnergyDistribution.log_prob`` itself.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "log_prob":
        if frame.f_code in _MIXTURES:
            return _MIXTURES[frame.f_code]
        frame = frame.f_back
    return None
