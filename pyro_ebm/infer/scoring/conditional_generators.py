"""Whether a generator is one law for all rows: pooled draws of several would be fitted as a mix.

A law that differs from row to row by a context is the law of no row once its draws are pooled, and
neither its parameters nor those of an energy relative to it come out as those of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, PushforwardDistribution
from pyro_ebm.distributions.layers import innermost
from pyro_ebm.infer.scoring.contrast import contrast_law
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.ops.same_values import same_values


@torch.no_grad()
def check_generator(name: str, p: EnergyDistribution, x: Tensor, noise: Any, who: str) -> None:
    """Raises ``ValueError`` if the generator that a site is compared with depends on the row.

    Args:
        name: The site.
        p: The EBM; with ``conditional=False`` nothing is looked at.
        x: Its data, ``sample + batch + event``.
        noise: The law that draws, anything if it is no generator; ``None`` for the base.
        who: The objective.
    """
    if p.conditional is False or (p.base is None and noise is None):
        return
    law = contrast_law(noise, p, x, needs_density=False, who=who)
    if not isinstance(law, PushforwardDistribution):
        return
    with rng_preserved():
        z = law.prior.sample()
        for dim in range(len(law.batch_shape)):
            if any(_knows_rows(function, z, dim) for function in _functions(law)):
                raise ValueError(
                    f"the generator of EBM site {name!r} depends on row-wise values other than its "
                    f"latent, but {who} pools all rows and would fit their mixture: append the "
                    "context to the data and to the draws and say conditional=False, as where this "
                    "is wrong"
                )


def _functions(law: Any) -> list[Callable[[Tensor], Tensor]]:
    """What makes draws of a generator: itself, and the law of its latents."""
    has_density = not isinstance(innermost(law.prior), PushforwardDistribution)
    return [law.generator, law.prior.log_prob] if has_density else [law.generator]


def _knows_rows(function: Callable[[Tensor], Tensor], z: Tensor, dim: int) -> bool:
    """Whether values at latents of other rows are not those of the other rows, but for chance."""
    value = function(z)
    if same_values(function(z.roll(1, dim)), value.roll(1, dim)):
        return False
    return same_values(function(z), value)
