r"""What exchange reads off an EBM site once must be the same at every value of the latents.

A proposal is judged by :math:`(\eta - \eta') \cdot T(y)`, with T and what counts of y as they were
at one draw of the model. If a latent moves T itself (a curved family), or a part of the energy
beside :math:`-\eta \cdot T`, energies at two parameters do not differ by that; if it moves the
mask, Z enters the likelihood a number of times that changes, which no ratio of two Z's of one data
set makes up for. Chains would mix, to the wrong posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from torch import Tensor

from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.mcmc.targets.model_target import ModelTarget
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.ops.rng import rng_preserved

NUM_POSITIONS = 64
SPREADS = (1.0, 5.0)  # of the positions around the first one, as chains start around zero
_NUM_EPS = 1e3  # units in the last place by which vmap may be off


class SeenSites(Protocol):
    """EBM sites in one run of a model: their laws, and what counts of each, scale times mask."""

    laws: dict[str, Any]
    weights: Values


def check_fixed_sites(
    target: ModelTarget, look: Callable[[Tensor], SeenSites], observed: Values
) -> None:
    """Raises if statistics, mask, scale or the rest of the energy of a site depend on a latent.

    They are compared at some positions. That a latent is in the graph of the statistics counts too:
    there are data at which they happen not to move, such as zeros.

    Args:
        target: The model.
        look: From a position ``(D,)`` to the sites there.
        observed: Values of the sites, ``B + event``.

    Raises:
        ValueError: If one does; the message names the site.
    """
    with rng_preserved(), pyro.validation_enabled(is_validate=False):
        _check_graphs(look, target.first, observed)
        q = target.draw_start(target.num_rows(NUM_POSITIONS))
        with torch.no_grad():
            first = _terms(look(target.first), observed)
            for spread in SPREADS:
                with suppress(torch.linalg.LinAlgError):  # by the values, far out
                    _check_values(target, look, observed, first, target.first + spread * q)


def _check_graphs(look: Callable[[Tensor], SeenSites], q: Tensor, observed: Values) -> None:
    with torch.enable_grad():
        q = q.detach().requires_grad_()
        for (name, what), (value, _) in _terms(look(q), observed).items():
            if what != "energy" and value.requires_grad and _leads_to(value, q):  # it cancels
                raise ValueError(_sentence(name, what))


def _leads_to(value: Tensor, q: Tensor) -> bool:
    return torch.autograd.grad(value.sum(), q, allow_unused=True)[0] is not None


def _check_values(
    target: ModelTarget,
    look: Callable[[Tensor], SeenSites],
    observed: Values,
    first: Mapping[tuple[str, str], Term],
    q: Tensor,
) -> None:
    def changes(row: Tensor) -> tuple[Tensor, ...]:
        terms = _terms(look(row), observed)
        return tuple(_change(term, terms[key]) for key, term in first.items())

    for (name, what), change in zip(first, target.over_rows(changes, q), strict=True):
        if bool((change > 0).any()):
            raise ValueError(_sentence(name, what))


class Term(NamedTuple):
    """Something that must not move.

    Args:
        value: What it is.
        size: Of what it was computed from, of its shape: the measure of rounding errors.
    """

    value: Tensor
    size: Tensor


def _terms(sites: SeenSites, observed: Values) -> dict[tuple[str, str], Term]:
    """What a site's natural parameters do not hold, by site and kind."""
    found = {(n, "weights"): Term(w, w.abs()) for n, w in sites.weights.items()}
    for name, law in sites.laws.items():
        energy, x = law.energy_function, observed[name]
        if isinstance(energy, ExponentialFamily):
            statistics = energy.statistics(x)
            found[name, "statistics"] = Term(statistics, statistics.abs().nan_to_num(0.0))
            natural = energy.natural().to(statistics.dtype)
            whole, linear = _coarse(energy(x), -(statistics * natural).sum(-1))
            found[name, "energy"] = Term(whole - linear, whole.abs().maximum(linear.abs()))
    return found


def _coarse(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors in the dtype of the one that has fewer digits."""
    dtype = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return one.to(dtype), other.to(dtype)


def _change(first: Term, now: Term) -> Tensor:
    """How far a term is from what it was, beyond rounding; 0-d."""
    sizes = torch.maximum(first.size, now.size)
    known = sizes.isfinite()  # far out, energies are not
    size = torch.where(known, sizes, 0.0).amax().clamp_min(torch.finfo(sizes.dtype).tiny)
    same = (now.value == first.value) | (now.value.isnan() & first.value.isnan())  # masked rows
    off = torch.where(same | ~known, 0.0, (now.value - first.value).abs() / size)
    return torch.relu(off.nan_to_num(torch.inf).amax() - _NUM_EPS * torch.finfo(off.dtype).eps)


def _sentence(name: str, what: str) -> str:
    if what != "weights":
        part = "statistics" if what == "statistics" else "terms beside -natural * statistics"
        return (
            f"EBM site {name!r}: the {part} of its energy depend on a latent, and exchange and "
            "anchors follow a law by its natural parameters alone: hold that latent fixed, give "
            "the distribution a log_normalizer, or use posterior(..., method='generalized')"
        )
    return (
        f"EBM site {name!r}: its mask or scale depends on a latent, so that Z counts more often at "
        "some values than at others, which exchange and anchors do not follow: give the "
        "distribution a log_normalizer, or mask rows by what is observed"
    )
