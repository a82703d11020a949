"""Where a model is first run: at the first chain's starting values, if a run has them.

Uniform draws from (-2, 2), by which Pyro looks for a point of finite density, never find one where
the data leave a narrow region, as that below the least of some waiting times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro.distributions.transforms import biject_to
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from pyro_ebm.mcmc.targets.target import Values


def first_chain(initial_params: Mapping[str, Any] | None) -> Values:
    """Returns the first chain's starting values, of those that are tensors with a dim of chains.

    What is wrong with others is said where the chains start.

    Args:
        initial_params: Site name to unconstrained values, ``(num_chains, ...)``.
    """
    given = (initial_params or {}).items()
    return {n: v[0] for n, v in given if isinstance(v, Tensor) and v.dim() and len(v)}


@dataclass(frozen=True)
class AtValues:
    """Pyro's ``init_strategy`` that puts sites at unconstrained values, others anywhere.

    Args:
        values: Site name to unconstrained values; such as do not fit their site are left out.
    """

    values: Values

    def __call__(self, site: Any) -> Tensor:
        """Returns where a site is, on its support."""
        anywhere: Tensor = init_to_uniform(site)
        given = self.values.get(site["name"])
        if given is None:
            return anywhere
        to_support = biject_to(site["fn"].support)
        free = to_support.inv(anywhere)
        return to_support(given.to(free)) if given.shape == free.shape else anywhere
