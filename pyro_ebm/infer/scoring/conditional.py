r"""Whether rows of a site need a log Z each: then one number for all would be inconsistent.

If :math:`E(x_i, z_i)` depends on a context :math:`z_i`, so does :math:`\log Z(z_i)`. An objective
with one log Z would learn a compromise: the slope of a regression comes out at two thirds. Two
tests find out. With several rows, permuting those of ``x`` permutes the energies of an
unconditional model. With one row at a time, the model is run on arguments that remember what they
are, and the energy is evaluated at an ``x`` that does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, unwrap
from pyro_ebm.errors import ConditionalEnergyError, SurrogateWarning
from pyro_ebm.infer.scoring.arguments import mapped
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.ops.module_calls import buffers_restored
from pyro_ebm.ops.same_values import same_values
from pyro_ebm.poutine.aside import aside
from pyro_ebm.poutine.paired_runs import without_value_checks

TRAINING = "RankingNCE or EnergyDiscrepancy"
"""Objectives that need no log Z of rows."""


def check_rows(
    name: str, p: EnergyDistribution, x: Tensor, who: str, instead: str = TRAINING
) -> None:
    """Raises ``ConditionalEnergyError`` if one scalar log Z cannot serve all rows of a site.

    Args:
        name: The site.
        p: Its EBM.
        x: Its data.
        who: What has one log Z.
        instead: What does without it.
    """
    if p.conditional is False:
        return
    if p.conditional or depends_on_rows(p, x):
        refuse(name, p, who, instead=instead)


@torch.no_grad()
def depends_on_rows(p: EnergyDistribution, x: Tensor) -> bool:
    """Returns whether energies depend on more of a row than its ``x``."""
    value = _in_this_state(p, x)
    rows = x.dim() - len(p.event_shape)
    for dim in range(rows):
        if x.shape[dim] > 1:
            moved = _in_this_state(p, x.roll(1, dim))
            if not same_values(moved, value.roll(1, dim - rows)):
                return not _is_random(p, x)
    return False


def _is_random(p: EnergyDistribution, x: Tensor) -> bool:
    """Whether two evaluations at one point differ; nothing can be said of such an energy."""
    if torch.allclose(_in_this_state(p, x), _in_this_state(p, x), equal_nan=True):
        return False
    warnings.warn(
        f"{p!r} is random (dropout?), so it could not be checked whether it depends on row-wise "
        "values other than x; say conditional=True or False",
        SurrogateWarning,
        stacklevel=2,
    )
    return True


@buffers_restored()
def _in_this_state(p: EnergyDistribution, x: Tensor) -> Tensor:
    """-U(x) in nats; modules with a state, as of spectral norms, are left in the one they had."""
    return p.unnormalized_log_prob(x)


def needs_arguments(p: EnergyDistribution, x: Tensor) -> bool:
    """Whether only the model's arguments can tell: there is one row, and the user has not said."""
    return p.conditional is None and rows_of(p, x).numel() <= 1


def check_arguments(
    name: str, model: Callable[..., Any], args: Any, kwargs: Any, values: Any, who: str
) -> None:
    """Raises ``ValueError`` if the energy of a site depends on arguments other than by its ``x``.

    Args:
        name: The site.
        model: The model.
        args: Its arguments; those that are tensors are told apart.
        kwargs: Its keyword arguments, likewise.
        values: Values of its latents.
        who: The objective.

    Warns:
        SurrogateWarning: If the model cannot be run on such arguments.
    """
    try:
        marked, named = mapped(_mark, args, kwargs)
        with torch.no_grad(), without_value_checks(), aside():
            trace = poutine.trace(poutine.condition(model, values)).get_trace(*marked, **named)
            site = trace.nodes[name]
            p = unwrap(site["fn"])
            found = get_provenance(p.energy(detach_provenance(site["value"])))  # type: ignore[union-attr]
    except Exception as error:  # models may do anything with their arguments
        what = (
            "with one row at a time it could not be checked whether the energy depends on a context"
        )
        warn_unchecked(name, what, error)
        return
    if found:
        refuse(name, p, who, f" ({', '.join(sorted(map(str, found)))})")


def warn_unchecked(name: str, what: str, error: Exception) -> None:
    """Warns that a site could not be checked."""
    warnings.warn(
        f"EBM site {name!r}: {what} ({error}); say conditional=True or False",
        SurrogateWarning,
        stacklevel=3,
    )


def check_weights(name: str, scale: Any, what: str) -> None:
    """Raises ``ValueError`` if rows weigh differently where they are taken alike.

    Args:
        name: The site.
        scale: Its scale.
        what: What takes them alike, and what to use instead: the end of a sentence.
    """
    if (
        isinstance(scale, Tensor)
        and scale.numel() > 1
        and bool((scale != scale.flatten()[0]).any())
    ):
        raise ValueError(
            f"rows of EBM site {name!r} have weights of their own (poutine.scale), and {what}"
        )


def _mark(label: str, value: Any) -> Any:
    return ProvenanceTensor(value, frozenset({label})) if isinstance(value, Tensor) else value


def refuse(name: str, p: Any, who: str, what: str = "", *, instead: str = TRAINING) -> None:
    """Raises ``ConditionalEnergyError``: one log Z cannot serve all rows of a site."""
    others = "" if isinstance(p, GeneralizedEBM) else f"use {instead}, "
    raise ConditionalEnergyError(
        f"the energy of EBM site {name!r} depends on row-wise values other than x{what}, so log Z "
        f"differs from row to row and {who}, with one log Z for all, would be inconsistent: "
        f"{others}give log_normalizer= as a function of the context, or say conditional=False if "
        "this is wrong"
    )
