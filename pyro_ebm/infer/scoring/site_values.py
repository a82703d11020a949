"""What EBM sites must be: given by data or guide, on the support, such that an objective suits.

What is asked of all sites of a run is asked before any is scored: Pyro wraps a ``ValueError`` of a
log density into a table of all shapes of the model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.distributions.moved_parameters import moved_only
from pyro_ebm.distributions.supports import tensors_in
from pyro_ebm.errors import EnergyShapeError, SurrogateWarning
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.infer.scoring.coupled_energies import refuse_coupled
from pyro_ebm.ops.autograd import grad_of
from pyro_ebm.ops.autograd_graph import leaves_of
from pyro_ebm.ops.graph_recording import is_recording, require
from pyro_ebm.poutine.aside import aside
from pyro_ebm.poutine.surrogate import surrogate_of


class Traits(Protocol):
    """What is asked of an objective here."""

    needs_density: bool
    trains_energy: bool
    has_second_player: bool

    @property
    def learns_log_normalizer(self) -> bool:
        """Whether log Z enters the loss, so that it is learned."""


def given(model_trace: Any, guide_trace: Any, used: Collection[str]) -> None:
    """Raises ``ValueError`` for an EBM site whose value is a draw of its own.

    Draws of the energy would be told from draws of the contrast, and nothing learned of any data.
    """
    for name in used:
        if not model_trace.nodes[name]["is_observed"] and name not in guide_trace.nodes:
            raise ValueError(
                f"EBM site {name!r} is neither observed nor in the guide, so that its values are "
                "draws of the energy itself, from which nothing is learned: pass obs= if it has "
                "data, or give the guide a sample site of this name if it is a latent"
            )


def on_support(name: str, site: Any) -> None:
    """Raises ``ValueError`` if data of an EBM site are NaN, infinite or off its support.

    Masked rows may be anything. The support is looked at where the distribution validates values;
    of a graph that is recorded it is a condition.

    Args:
        name: The site's name.
        site: Its node in a trace, with the surrogate in place.

    Raises:
        TypeError: If they are no tensor.
    """
    if not isinstance(site["value"], Tensor):
        raise TypeError(
            f"EBM site {name!r}: the data must be a tensor, got {type(site['value']).__name__}: "
            "give torch.as_tensor(data)"
        )
    scored = surrogate_of(site["fn"])
    x = scored.p.broadcast_value(scored.without_padding(site["value"].detach()))
    if is_recording():
        require(x.isfinite().all() & scored.support.check(x).all())
        return
    if math.isfinite(x.sum()) and not scored._validate_args:  # far faster than to ask each
        return
    good, what = x.isfinite(), "NaN or infinite, not"
    if scored._validate_args and good.all():
        good, what = scored.support.check(x), "not"
    if not good.all():
        rows = ~good.reshape(rows_of(scored.p, x) + (-1,)).all(-1)
        raise ValueError(
            f"EBM site {name!r}: {int(rows.sum())} of {rows.numel()} rows of the data are {what} "
            f"points of the support {scored.support}: leave these out, or mask them by poutine.mask"
        )


def one_energy_per_row(name: str, p: EnergyDistribution, x: Tensor) -> None:
    """Raises ``EnergyShapeError`` for an energy with dims of size one before those of ``x``.

    Draws beside the rows have that place, and would be taken for one another.

    Raises:
        TypeError: If the energy fails on data of this dtype, and not on another.
    """
    try:
        with torch.no_grad():
            shape = p.energy(x).shape
    except RuntimeError as error:
        taken = _dtype_taken(p, x)
        if taken in (None, x.dtype):
            raise
        raise TypeError(
            f"EBM site {name!r}: the data are {x.dtype} and the energy takes {taken}: call "
            f"x.to({taken}), or network.to({x.dtype})"
        ) from error
    rows = rows_of(p, x)
    extra = len(shape) - len(rows)
    if extra > 0 and shape[:extra].numel() == 1:
        raise EnergyShapeError(
            f"EBM site {name!r}: energy returned shape {tuple(shape)} for input {tuple(x.shape)}; "
            f"expected {tuple(rows)}, one value per event. Did you add a dim in front, as "
            "unsqueeze(0) or a parameter of shape (1, 1) does?"
        )


def _dtype_taken(p: EnergyDistribution, x: Tensor) -> torch.dtype | None:
    """Returns a floating-point dtype in which the energy takes ``x``; ``None`` if there is none."""
    for dtype in (torch.get_default_dtype(), torch.float32, torch.float64):
        with suppress(Exception), torch.no_grad(), aside():  # whatever an energy does to others
            p.energy(x.to(dtype))
            return dtype
    return None


def suits(
    name: str, p: EnergyDistribution, x: Tensor, *, observed: bool, objective: Traits
) -> None:
    """Raises if the objective cannot serve this site (checked once per site).

    Raises:
        ValueError: If the distribution, its support or the data's dtype do not suit it, the support
            is inferred, or the energy of a row depends on other rows.
        TypeError: If the energy takes another dtype than the data's.
        EnergyShapeError: If the energy has a dim too many.
    """
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
    if objective.trains_energy and p.base_measure == "lebesgue" and not x.is_floating_point():
        taken = _dtype_taken(p, x) or torch.get_default_dtype()
        raise ValueError(
            f"{who} takes the data of EBM site {name!r} as points of {p.support}, so x must be "
            f"floating point, got {x.dtype}: call x.to({taken}) if the data are "
            "measurements, or give the distribution a discrete support and use NCE or "
            "PseudoLikelihood"
        )
    _log_normalizer_is_learned(name, p, x, objective)
    if objective.trains_energy and not objective.has_second_player:  # whose may be the support
        has_fixed_support(name, p, who)
    if objective.trains_energy:
        one_energy_per_row(name, p, x)
        refuse_coupled(name, p, x)
    if objective.trains_energy and x.is_floating_point() and p.base_measure != "counting":
        try:
            _, slope = grad_of(p.energy, x)
        except ValueError as error:
            raise ValueError(f"EBM site {name!r}: {error}") from error
        if not slope.any() and not leaves_of(p.energy(x)):
            warnings.warn(
                f"EBM site {name!r}: the energy is constant at the data and has no parameters, so "
                "that nothing is learned of it. Does it use x?",
                SurrogateWarning,
                stacklevel=2,
            )


def has_fixed_support(name: str, p: EnergyDistribution, who: str) -> None:
    """Raises ``ValueError`` if bounds of a site's support are inferred.

    All of a support's mass stays within it, wherever it ends: only log Z weighs one end against
    another.

    Args:
        name: The site.
        p: The EBM.
        who: The objective.
    """
    leaves = [leaf for bound in tensors_in(p.support) for leaf in leaves_of(bound)]
    if moved_only(leaves):
        raise ValueError(
            f"the support of EBM site {name!r} depends on what is inferred, and {who} cannot tell "
            "one support from another: detach its bounds, or give log_normalizer= as a function of "
            "them and infer by likelihood (infer.posterior, pyro.infer.Trace_ELBO)"
        )


def _log_normalizer_is_learned(
    name: str, p: EnergyDistribution, x: Tensor, objective: Traits
) -> None:
    """Warns if the site's log Z has parameters of its own and the objective never moves them."""
    log_z = None if objective.learns_log_normalizer else p.log_normalizer_value()
    if log_z is None or not log_z.requires_grad:
        return
    moved = {id(t) for t in leaves_of(p.unnormalized_log_prob(x))}
    if any(id(t) not in moved for t in leaves_of(log_z)):
        warnings.warn(
            f"EBM site {name!r}: log_normalizer= has parameters of its own, but log Z cancels in "
            f"{type(objective).__name__}, so that they are not learned and log_prob stays off by "
            "as much. Learn it with NCE or KALE, or leave log_normalizer= out",
            SurrogateWarning,
            stacklevel=2,
        )
