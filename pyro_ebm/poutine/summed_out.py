r"""Discrete latents that are summed out around an EBM site, where only a loss stands for it.

Summing out k turns a site that depends on it into :math:`\log \sum_k p(k)\, e^{-L_k(x)}`. Of a
likelihood that is right; an objective's loss :math:`L_k` leaves out :math:`\log Z_k`, component by
component, so that weights and energies come out wrong and nothing shows it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.ops.rng import rng_preserved


def refuse_mixture(
    name: str, p: EnergyDistribution, x: Tensor, enumerated: Mapping[str, int], *, event_made: int
) -> None:
    """Raises ``NotImplementedError`` if an EBM site depends on an enumerated latent.

    It shows in the shape of the energy: every such latent has a dim of its own.

    Args:
        name: The site.
        p: Its EBM.
        x: Its value.
        enumerated: Latents that are summed out, by name, and their (negative) batch dims.
        event_made: How many of the EBM's batch dims ``to_event`` has made event dims.
    """
    with torch.no_grad(), rng_preserved():
        log_p = p.unnormalized_log_prob(x)
    shape = log_p.shape[: log_p.dim() - event_made]
    found = [k for k, dim in enumerated.items() if len(shape) >= -dim and shape[dim] > 1]
    if found:
        names = ", ".join(map(repr, found))
        raise NotImplementedError(
            f"site {names} is enumerated and EBM site {name!r} depends on it: summing it out would "
            "put an objective's loss, which is no likelihood, into the logarithm of a sum. Sum it "
            "out in the energy, U(x) = -log sum_k exp(a_k - U_k(x)), where a_k = log p(k) - log Z_k"
            " may be a learned parameter for every k"
        )
