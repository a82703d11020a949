"""What a model and its data must satisfy before an objective may learn from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import check_site_shape
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, unwrap
from pyro_ebm.distributions.normalizer_guard import captured_only, leaves_of, names_of
from pyro_ebm.errors import NonFiniteEnergyError, UnregisteredParameterError
from pyro_ebm.ops.autograd import grad_of


class Traits(Protocol):
    """What is asked of an objective here."""

    needs_density: bool
    has_second_player: bool


def schedule(value: tuple[int, int] | None, objective: Traits) -> tuple[int, int] | None:
    """Returns a valid schedule of two players.

    Raises:
        ValueError: If it is not two non-negative integers with a positive sum, or there is no
            second player.
    """
    if value is None:
        return None
    if not objective.has_second_player:
        raise ValueError(
            f"{type(objective).__name__} has no second player, so it takes no schedule"
        )
    if len(value) != 2 or min(value) < 0 or sum(value) == 0:
        raise ValueError(
            f"schedule must be (energy steps, generator steps), two counts, got {value!r}"
        )
    return (int(value[0]), int(value[1]))


def has_sites(used: Collection[str]) -> None:
    """Raises ``ValueError`` if the model has no EBM site."""
    if not used:
        raise ValueError(
            "the model has no EnergyDistribution site for the objective to learn from; "
            "for a model without one use pyro.infer.Trace_ELBO"
        )


def site(name: str, p: EnergyDistribution, x: Tensor, *, observed: bool, objective: Traits) -> None:
    """Raises ``ValueError`` if the objective cannot serve this site (checked once per site)."""
    who = type(objective).__name__
    if isinstance(p, GeneralizedEBM) and not observed:
        raise ValueError(
            f"GeneralizedEBM site {name!r} is latent: sample it through poutine.reparam(model, "
            f"{{{name!r}: LatentReparam()}})"
        )
    if isinstance(p, GeneralizedEBM) and objective.needs_density:
        raise ValueError(
            f"{who} needs a density, and GeneralizedEBM site {name!r} has none: use KALE or "
            "DonskerVaradhan"
        )
    if x.is_floating_point() and p.base_measure != "counting":
        try:
            grad_of(p.energy, x)
        except ValueError as error:
            raise ValueError(f"EBM site {name!r}: {error}") from error


def not_conditional(name: str, p: EnergyDistribution, x: Tensor, who: str) -> None:
    """Raises ``ValueError`` if one scalar log Z cannot serve all rows of a site.

    Tested by permuting the rows of ``x``: the energies of an unconditional model are permuted with
    them.
    """
    if p.conditional is False:
        return
    if p.conditional or _depends_on_rows(p, x):
        raise ValueError(
            f"the energy of EBM site {name!r} depends on row-wise values other than x, so log Z "
            "differs from row to row "
            f"and {who} with one scalar log Z would be inconsistent. Use RankingNCE or "
            "EnergyDiscrepancy (no log Z), "
            "give log_normalizer= as a function of the context, or say conditional=False if this "
            "is wrong"
        )


@torch.no_grad()
def _depends_on_rows(p: EnergyDistribution, x: Tensor) -> bool:
    value = p.unnormalized_log_prob(x)
    rows = x.dim() - len(p.event_shape)
    for dim in range(rows):
        if x.shape[dim] > 1:
            moved = p.unnormalized_log_prob(x.roll(1, dim))
            if not torch.allclose(
                moved, value.roll(1, dim - rows), rtol=1e-3, atol=1e-4, equal_nan=True
            ):
                return True
    return False


def full_data(name: str, site: Any) -> None:
    """Raises ``ValueError`` if a site that is to be frozen sees a subsample: the next one would be
    other rows.
    """
    for frame in site["cond_indep_stack"]:
        full = getattr(frame, "full_size", None)
        if full is not None and full != frame.size:
            raise ValueError(
                f"EBM site {name!r} is in the subsampling plate {frame.name!r} ({frame.size} of "
                f"{full} rows): a frozen "
                "objective needs the full data, take subsample_size away"
            )


def guide(given: Any, who: str) -> None:
    """Raises ``TypeError`` for a guide that runs the model itself: its sites would be taken for
    contrasts.
    """
    if isinstance(poutine.unwrap(given), Messenger):
        raise TypeError(
            f"{type(given).__name__} is an effect-style guide, which runs the model by itself: "
            "build it on "
            f"poutine.surrogate(model, {who}()) and use it with pyro.infer.Trace_ELBO"
        )


def traces(model_trace: Any, guide_trace: Any, used: Collection[str]) -> None:
    """Raises if the traces of an objective's step hold something it would get wrong."""
    has_sites(used)
    for name, node in (*model_trace.nodes.items(), *guide_trace.nodes.items()):
        if node["type"] == "sample" and node["infer"].get("enumerate"):
            raise NotImplementedError(
                f"site {name!r} is enumerated; objectives do not sum out sites. Marginalize it in "
                "the energy, or infer "
                "it with a guide"
            )
    for name, node in guide_trace.nodes.items():
        ebm = unwrap(node["fn"]) if node["type"] == "sample" else None
        contrast = model_trace.nodes.get(name, {}).get("is_observed", False)
        if ebm is not None and not contrast and not ebm.is_normalized:
            raise ValueError(
                f"guide site {name!r} is an EnergyDistribution with unknown log Z: a variational "
                "factor must be "
                "normalized. Use a normal or a flow, or sample the latent by MCMC"
            )


def shapes(model_trace: Any, guide_trace: Any, max_plate_nesting: float) -> None:
    """Raises ``ValueError`` where a site has batch dims that no plate declares, as Pyro's own ELBOs
    do.
    """
    if not is_validation_enabled():
        return
    for trace in (model_trace, guide_trace):
        for node in trace.nodes.values():
            if node["type"] == "sample":
                check_site_shape(node, max_plate_nesting)


def finite(model_trace: Any, used: Collection[str], step: int) -> None:
    """Raises ``NonFiniteEnergyError`` naming an EBM site whose surrogate is not finite (masked rows
    do not count).
    """
    for name in used:
        log_prob = model_trace.nodes[name]["log_prob"]
        bad = ~torch.isfinite(log_prob.detach())
        if bad.any():
            raise NonFiniteEnergyError(
                f"EBM site {name!r}: the surrogate is not finite in {int(bad.sum())} of "
                f"{bad.numel()} rows at step {step}. "
                "Look for overflow in the energy at data or contrast, standardize the data, or "
                "lower the learning rate"
            )


def registered(
    model_trace: Any,
    used: Collection[str],
    sites: Mapping[str, EnergyDistribution],
    expected: Collection[int],
) -> None:
    """Raises if a parameter gets gradient through a surrogate and no optimizer will move it.

    Only decidable while parameters are being captured, as in ``SVI.step`` and ``fit``.
    """
    if not any(isinstance(h, TraceMessenger) and h.param_only for h in _PYRO_STACK):
        return
    for name in used:
        leaves = leaves_of(model_trace.nodes[name]["log_prob"])
        moved = {id(t) for t in captured_only(leaves)} | set(expected)
        lost = [t for t in leaves if id(t) not in moved]
        if lost:
            energy = sites[name].energy_function
            raise UnregisteredParameterError(
                f"EBM site {name!r}: {names_of(lost, energy)} would get gradients and never move, "
                "because Pyro does not "
                "know of it. Call pyro.module('energy', energy) in the model, make it a "
                "PyroModule, or freeze it with "
                "requires_grad_(False)"
            )
