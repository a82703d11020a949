"""A posterior is of all rows once: no plate takes some of them, no scale counts them more often.

Pyro multiplies what stands in a plate of 12 rows, of which 3 are taken, by 4. That is an estimate
of the sum over all rows, for training by mini-batches; a posterior under it is that of 12 rows in
which 3 were seen four times each, and too narrow, also where the rows are fixed. A posterior under
``poutine.scale`` holds a power of the likelihood.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine import Trace


def check_whole(trace: Trace) -> None:
    """Raises if a plate takes some of its rows only, at random or by ``subsample=``.

    Args:
        trace: A run of the model.

    Raises:
        ValueError: If one does; the message names the plate.
    """
    samples = (site for site in trace.nodes.values() if site["type"] == "sample")
    for frame in (frame for site in samples for frame in site["cond_indep_stack"]):
        if frame.full_size not in (None, frame.size):
            raise ValueError(
                f"plate {frame.name!r} is subsampled: {frame.size} of {frame.full_size} rows stand "
                "for all, their likelihood is scaled up, and a posterior of that is too narrow. "
                "Give the model all rows, or those that are to count with a plate of their number, "
                "and no subsample"
            )


def check_site_unscaled(site: dict[str, Any], why: str) -> None:
    """Raises if a site is scaled.

    Args:
        site: A sample site of a run of the model.
        why: What a scale is in the way of, a clause.

    Raises:
        ValueError: If it is; the message names the site.
    """
    scale = torch.as_tensor(site["scale"])
    if bool((scale != 1).any()):
        raise ValueError(
            f"site {site['name']!r} is scaled by {float(scale.max()):.6g}: {why}; take "
            "poutine.scale away and draw without it, or, if it counts equal rows, give every row "
            "as often as it counts"
        )
