"""Reading the call stack for the few facts that Pyro does not pass on.

Used only on rare paths (an error or a warning is due, or a scheduled check runs), never on every
call: Pyro scores a site, draws a prototype or predicts without telling the distribution which of
these it is doing.
"""

from __future__ import annotations

import sys
from types import FrameType

_PROTOTYPE = (
    "_guess_max_plate_nesting",
    "initialize_model",
    "_setup_prototype",
    "_get_init_params",
)


def frame_of(functions: tuple[str, ...], depth: int = 40) -> FrameType | None:
    """Returns the nearest calling frame of one of these functions, looking ``depth`` frames up."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(depth):
        if frame is None or frame.f_code.co_name in functions:
            return frame
        frame = frame.f_back
    return None


def site_being_scored() -> str | None:
    """Returns the name of the sample site whose ``log_prob`` Pyro is computing."""
    frame = frame_of(("compute_log_prob", "log_prob_sum", "compute_score_parts"), depth=10)
    return frame.f_locals.get("name") if frame else None


def is_prototype_run() -> bool:
    """Whether Pyro runs the model only to learn its shapes (MCMC set-up, guide set-up)."""
    return frame_of(_PROTOTYPE) is not None


def is_sequential_predictive() -> bool:
    """Whether ``Predictive`` runs the model once per draw."""
    return frame_of(("_predictive_sequential",)) is not None
