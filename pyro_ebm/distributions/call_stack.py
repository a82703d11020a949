"""Reading the call stack for the few facts that Pyro does not pass on.

Pyro scores a site, draws a prototype or predicts without telling the distribution which of these it
is doing. Searches are for rare paths (an error or a warning is due, a scheduled check runs); only
the look at the immediate caller is cheap enough for every call.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

from pyro.distributions import ZeroInflatedDistribution
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import MixtureSameFamily

_PROTOTYPE = (
    "_guess_max_plate_nesting",
    "initialize_model",
    "_setup_prototype",
    "_get_init_params",
    "check_structure",
    "check_fixed_supports",
)

_MIXTURES = {
    kind.log_prob.__code__: kind.__name__ for kind in (MixtureSameFamily, ZeroInflatedDistribution)
}


def frame_of(functions: tuple[str, ...], depth: int = 40) -> FrameType | None:
    """Returns the nearest calling frame of one of these functions, looking ``depth`` frames up."""
    frame: FrameType | None = sys._getframe(1)
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
    frame = frame_of(("compute_log_prob", "log_prob_sum", "compute_score_parts"), depth=10)
    trace = frame.f_locals.get("self") if frame is not None else None
    if frame is None or not isinstance(trace, Trace) or "name" not in frame.f_locals:
        return Scoring()
    name, is_guide = frame.f_locals["name"], frame.f_code.co_name == "compute_score_parts"
    values = {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and n != name}
    latents = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.requires_grad}
    return Scoring(name, trace.nodes[name]["scale"], is_guide, latents)


def is_prototype_run() -> bool:
    """Whether Pyro runs the model only to learn its shapes (MCMC set-up, guide set-up)."""
    return frame_of(_PROTOTYPE) is not None


def is_sequential_predictive() -> bool:
    """Whether ``Predictive`` runs the model once per draw."""
    return frame_of(("_predictive_sequential",)) is not None


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
