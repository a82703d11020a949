r"""What exchange reads off an EBM site once must be the same at every value of the latents.

A proposal is judged by :math:`(\eta - \eta') \cdot T(y)`, with T and what counts of y as they were
at one draw of the model. If a latent moves T itself (a curved family), energies at two parameters
do not differ by that; if it moves the mask, Z enters the likelihood a number of times that changes,
which no ratio of two Z's of one data set makes up for. Chains would mix, to the wrong posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor

from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.mcmc.model_target import ModelTarget
from pyro_ebm.mcmc.target import Values
from pyro_ebm.ops.rng import rng_preserved

NUM_POSITIONS = 8
SPREADS = (1.0, 5.0)  # of the positions, in units of where chains start


class SeenSites(Protocol):
    """EBM sites in one run of a model: their laws, and what counts of each, scale times mask."""

    laws: dict[str, Any]
    weights: Values


Look = Callable[[Tensor], SeenSites]


def check_fixed_sites(target: ModelTarget, look: Look, first: SeenSites, observed: Values) -> None:
    """Raises if statistics, mask or scale of a site depend on a latent.

    They are compared at some positions. That a latent is in the graph of the statistics counts too:
    there are data at which they happen not to move, such as zeros.

    Args:
        target: The model.
        look: From a position ``(D,)`` to the sites there.
        first: The sites at one position.
        observed: Values of the sites, ``B + event``.

    Raises:
        ValueError: If one does; the message names the site.
    """
    with rng_preserved(), pyro.validation_enabled(is_validate=False):
        q = target.draw_start(target.num_rows(NUM_POSITIONS))
        for name in _of_latents(look, q[0], observed):
            raise ValueError(_curved(name))
        with torch.no_grad():
            terms = _Terms(look, observed, _terms_of(first, observed))
            for spread in SPREADS:
                with suppress(torch.linalg.LinAlgError):  # far out, by the values
                    _raise_for(target.over_rows(terms.moved, spread * q), list(first.weights))


def _of_latents(look: Look, q: Tensor, observed: Values) -> list[str]:
    """The sites with a latent in the graph of their statistics."""
    with torch.enable_grad():
        q = q.detach().requires_grad_()
        told = _statistics(look(q), observed)
        return [name for name, t in told.items() if _leads_to(t, q)]


def _leads_to(value: Tensor, q: Tensor) -> bool:
    if not value.requires_grad:
        return False
    return torch.autograd.grad(value.sum(), q, allow_unused=True, retain_graph=True)[0] is not None


def _statistics(sites: SeenSites, observed: Values) -> Values:
    energies = {name: law.energy_function for name, law in sites.laws.items()}
    families = {n: e for n, e in energies.items() if isinstance(e, ExponentialFamily)}
    return {name: family.statistics(observed[name]) for name, family in families.items()}


def _terms_of(sites: SeenSites, observed: Values) -> tuple[Values, Values]:
    return _statistics(sites, observed), sites.weights


class _Terms:
    """Statistics and weights of sites, compared with those of one position.

    Args:
        look: From a position to the sites there.
        observed: Values of the sites.
        first: Statistics and weights at one position.
    """

    def __init__(self, look: Look, observed: Values, first: tuple[Values, Values]) -> None:
        self.look, self.observed, self.first = look, observed, first
