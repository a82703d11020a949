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
from torch import Tensor

from pyro_ebm.distributions import unwrap

UNDER_A_POSTERIOR = (
    "stand for all, their likelihood is scaled up, and a posterior of that is too narrow. Give the "
    "model all rows, or those that are to count with a plate of their number, and no subsample"
)
WHEN_FROZEN = (
    "are those of one run, and a frozen objective needs the full data: take subsample_size away"
)
WITHOUT_SCALE = (
    "take poutine.scale away and draw without it, or, if it counts equal rows, give every row as "
    "often as it counts"
)


def check_whole(trace: Trace) -> None:
    """Raises if a plate takes some of its rows only, which leaves no posterior of all.

    Args:
        trace: A run of the model.

    Raises:
        ValueError: If one does; the message names the plate.
    """
    for site in trace.nodes.values():
        if site["type"] == "sample":
            check_site_whole(site, UNDER_A_POSTERIOR)


def check_site_whole(site: dict[str, Any], why: str) -> None:
    """Raises if a plate around a site takes some of its rows only, at random or by ``subsample=``.

    Args:
        site: A sample site of a run of the model.
        why: What is wrong with these rows and what to do, a clause of which they are the subject.

    Raises:
        ValueError: If one does; the message names the plate.
    """
    for frame in site["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size):
            raise ValueError(
                f"plate {frame.name!r} is subsampled: {frame.size} of {frame.full_size} rows {why}"
            )


def check_counted_once(site: dict[str, Any]) -> None:
    """Raises if a value of an EBM site would count several times, under several laws.

    Pyro broadcasts an observed value to the distribution's batch, and ``Normal(zeros(3), 1)`` at
    one number is the density of three numbers. In a plate that is asked for; outside of one it is
    not, as where an argument that is one number for a law was given one for each part of an event.

    Args:
        site: An observed sample site of a run of the model.

    Raises:
        ValueError: If one would; the message names the site.
    """
    law = site["fn"]
    rows = site["value"].shape[: site["value"].dim() - len(law.event_shape)]
    declared = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
    for dim in range(-len(law.batch_shape), 0):
        size = law.batch_shape[dim]
        given = rows[dim] if -dim <= len(rows) else 1
        if size > given and declared.get(dim) != size:
            raise ValueError(
                f"EBM site {site['name']!r} has batch_shape {tuple(law.batch_shape)}, laws of "
                f"their own for data of shape {tuple(site['value'].shape)}, and these would count "
                f"{size} times along dim {dim}. Give its energy one number where it has an "
                "argument for a law, and write an energy of your own where every part of an event "
                "has one; if the same data are meant for all laws, put a pyro.plate of that dim "
                "around"
            )


def check_ebms_unscaled(trace: Trace, what: str) -> None:
    """Raises if an observed EBM site is scaled, which leaves no posterior by Bayes' rule.

    Args:
        trace: A run of the model.
        what: What was asked for, as the beginning of a sentence.

    Raises:
        ValueError: If one is; the message names the site.
    """
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"] and unwrap(site["fn"]) is not None:
            check_site_unscaled(
                site, f"{what} counts every row once (method='generalized' weighs its loss by it)"
            )


def check_site_unscaled(site: dict[str, Any], why: str) -> None:
    """Raises if a site is scaled.

    Args:
        site: A sample site of a run of the model.
        why: What a scale is in the way of, a clause.

    Raises:
        ValueError: If it is; the message names the site.
    """
    check_unscaled(site["name"], torch.as_tensor(site["scale"]), why)


def check_unscaled(name: str, scale: Tensor, why: str, remedy: str = WITHOUT_SCALE) -> None:
    """Raises if a scale is not one.

    Args:
        name: The site that it multiplies.
        scale: The scale, of any shape.
        why: What it is in the way of, a clause.
        remedy: What to do about it, a clause.

    Raises:
        ValueError: If it is not one everywhere; the message names the site.
    """
    if bool((scale != 1).any()):
        first = float(scale[scale != 1][0])
        raise ValueError(f"site {name!r} is scaled by {first:.6g}: {why}; {remedy}")
