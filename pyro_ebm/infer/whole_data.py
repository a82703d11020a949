"""A posterior is of all rows once: no plate takes some of them, no scale counts them more often.

Pyro multiplies what stands in a plate of 12 rows, of which 3 are taken, by 4. That is an estimate
of the sum over all rows, for training by mini-batches; a posterior under it is that of 12 rows in
which 3 were seen four times each, and too narrow, also where the rows are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace

from pyro_ebm.distributions import unwrap
from pyro_ebm.infer.run_modules import aside


def check_whole(trace: Trace) -> None:
    """Raises if a plate takes some of its rows only.

    Args:
        trace: A run of the model.

    Raises:
        ValueError: If one does; the message names the plate.
    """
    frames = {frame for _, site in _samples(trace) for frame in site["cond_indep_stack"]}
    for frame in frames:
        if frame.full_size not in (None, frame.size):
            raise ValueError(
                f"plate {frame.name!r} takes {frame.size} of {frame.full_size} rows, which scales "
                "their likelihood up and makes a posterior too narrow: give the model all rows, or "
                "those that are to count with a plate of their number, and no subsample"
            )


def check_unscaled(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str
) -> None:
    """Raises if an observed EBM site is scaled, which leaves no posterior by Bayes' rule.

    Args:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        what: What was asked for, as the beginning of a sentence.

    Raises:
        ValueError: If one is; the message names the site.
    """
    with aside():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    for name, site in _samples(trace):
        scale = torch.as_tensor(site["scale"])
        if site["is_observed"] and unwrap(site["fn"]) is not None and bool((scale != 1).any()):
            raise ValueError(
                f"{what} counts every row once, and EBM site {name!r} is scaled by "
                f"{float(scale.max()):.6g}: take poutine.scale away, or weigh a loss by "
                "method='generalized'"
            )


def _samples(trace: Trace) -> list[tuple[str, Any]]:
    return [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]
