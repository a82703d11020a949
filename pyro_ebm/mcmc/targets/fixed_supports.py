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

from pyro_ebm.distributions.call_stack import prototype_run
from pyro_ebm.distributions.supports import tensors_in
from pyro_ebm.poutine.aside import aside


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
    with prototype_run(), aside(), pyro.validation_enabled(is_validate=False):
        first, second = (poutine.trace(model).get_trace(*args, **kwargs) for _ in range(2))
    for name in first.stochastic_nodes:
        if name in second.nodes and _moves(_support(first, name), _support(second, name)):
            raise ValueError(
                f"site {name!r}: its support depends on other latents, which MCMC in Pyro does not "
                "follow. Sample on a fixed support and move the value, as b * u with u ~ "
                "Uniform(0, 1) for x ~ Uniform(0, b)"
            )


def _support(trace: Any, name: str) -> Any:
    return getattr(trace.nodes[name]["fn"], "support", None)  # the indices of a plate have none


def _moves(one: Any, two: Any) -> bool:
    """Whether two supports are made of other numbers."""
    pairs = zip(tensors_in(one), tensors_in(two), strict=False)
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
