"""Supports must not depend on latents: the way to the reals is fixed once, at the first trace.

In ``x ~ Uniform(0, b)`` with a latent b, every b has an interval of its own. Pyro maps x to the
reals by the interval of the first b drawn, for the whole run, and the posterior is wrong without a
word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch.distributions.constraints import Constraint

from pyro_ebm.ops.rng import rng_preserved

_BOUNDS = ("lower_bound", "upper_bound")


def check_fixed_supports(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raises if the support of a latent moves from one draw of the model to the next.

    Args:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: If it does; the message names the site.
    """
    with rng_preserved(), poutine.block(), pyro.validation_enabled(is_validate=False):
        first, second = (poutine.trace(model).get_trace(*args, **kwargs) for _ in range(2))
    for name in first.stochastic_nodes:
        if name in second.nodes and not _same(_support(first, name), _support(second, name)):
            raise ValueError(
                f"site {name!r}: its support depends on other latents, which MCMC in Pyro does not "
                "follow. Sample on a fixed support and move the value, as b * u with u ~ "
                "Uniform(0, 1) for x ~ Uniform(0, b)"
            )


def _support(trace: Any, name: str) -> Constraint | None:
    support: Any = getattr(trace.nodes[name]["fn"], "support", None)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _same(a: Constraint | None, b: Constraint | None) -> bool:
    for bound in _BOUNDS:
        one, two = getattr(a, bound, None), getattr(b, bound, None)
        if one is None or two is None:
            continue
        one, two = torch.as_tensor(one), torch.as_tensor(two)
        if one.shape != two.shape or not torch.equal(one, two):
            return False
    return True
