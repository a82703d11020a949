r"""What speaks against log Z from the draws of chains, a sentence each.

What chains seldom enter is in no error of an estimate. Three things tell of it: trajectories that
diverge, which end at the door of a narrow part (the neck of a funnel, a bent valley); chains that
disagree, in a coordinate or in their density; and momenta that are too short for the spread of
energies. Divergences alone do not do: chains of large steps turn away from a neck and hardly
diverge.

Thresholds are those of :func:`~pyro_ebm.chains.diagnose`, but for R-hat: many short chains are
enough for a mean, and it exceeds 1.05 where fewer than ten draws of half a chain are independent.
Few and short chains scatter: for C chains of 2n independent draws :math:`\hat R^2` has the standard
deviation :math:`\sqrt{2 / (2C - 1)} / n`, of which ten pass.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pyro_ebm.chains.diagnostics import MIN_BFMI, bfmi
from pyro_ebm.chains.record import Record, as_record
from pyro_ebm.normalizers.chain_size import MIN_LENGTH
from pyro_ebm.ops.rank_rhat import worst_rhat

MAX_DIVERGING = 0.005
"""Share of diverging trajectories that passes."""

MAX_RHAT = 1.05
"""Rank R-hat of many short chains that passes."""

_NUM_ERRORS = 10.0


def chain_remarks(source: Any, *, walled: bool = False) -> tuple[str, ...]:
    """Returns what speaks against an estimate from these draws; nothing if they look well.

    Args:
        source: What :func:`~pyro_ebm.chains.diagnose` takes. Bare draws have no statistics, and of
            chains of under 20 draws neither R-hat nor momenta say anything.
        walled: Whether trajectories diverge where a log Z made of draws is not told, and so say
            nothing of the law.

    Example:
        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> chain_remarks({"x": draws})
        ()
        >>> chain_remarks({"x": draws + torch.arange(4.0)[:, None]})[0].split(":")[0]
        'rank R-hat of x is 1.48'
    """
    record = as_record(source)
    of_trajectories = () if walled else _of_divergences(record)
    if record.num_samples < MIN_LENGTH:
        return of_trajectories
    return (*of_trajectories, *_of_mixing(record), *_of_momenta(record))


def _of_divergences(record: Record) -> tuple[str, ...]:
    share = float(np.mean(record.sample_stats.get("diverging", 0.0)))
    if share <= MAX_DIVERGING:
        return ()
    return (
        f"{share:.1%} of the trajectories diverge: chains do not enter narrow parts of the law (a "
        "funnel, a bent valley), whose mass is missing and in no error: choose other coordinates, "
        "or give draws of chains with a larger target_accept_prob",
    )


def _of_mixing(record: Record) -> tuple[str, ...]:
    """The worst site's R-hat, the log density being one of them."""
    stats = record.sample_stats
    judged = {**({"lp": stats["lp"]} if "lp" in stats else {}), **record.draws}
    worst = {n: worst_rhat(torch.as_tensor(x).transpose(0, 1)) for n, x in judged.items()}
    name = max(worst, key=worst.__getitem__)
    if worst[name] <= _passing_rhat(record.num_chains, record.num_samples // 2):
        return ()
    return (
        f"rank R-hat of {name} is {worst[name]:.2f}: chains do not agree on where the mass is, or "
        "are too short to tell, and what some miss is in no error: choose other coordinates (a "
        "hierarchy without centre, theta = mean + sd * z), or give draws of longer chains",
    )


def _passing_rhat(num_chains: int, length: int) -> float:
    scatter = math.sqrt(2.0 / (2 * num_chains - 1)) / length
    return math.sqrt(MAX_RHAT**2 + _NUM_ERRORS * scatter)


def _of_momenta(record: Record) -> tuple[str, ...]:
    """The BFMI of the chain in the middle: of a short one it scatters."""
    if "energy" not in record.sample_stats:
        return ()
    typical = float(np.median(bfmi(record.sample_stats["energy"])))
    if not typical < MIN_BFMI:
        return ()
    return (
        f"BFMI is {typical:.2f} < {MIN_BFMI}: momenta are too short for the spread of energies "
        "(heavy tails, a funnel), and tails are seen too little: choose other coordinates",
    )
