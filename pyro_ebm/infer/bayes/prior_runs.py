"""Runs of a model at draws of its prior.

One draw says little of a model: an effect may be off at it, or an energy proper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace

from pyro_ebm.distributions.call_stack import prototype_run
from pyro_ebm.poutine.aside import aside

NUM_DRAWS = 16


def prior_runs(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_draws: int = NUM_DRAWS,
) -> list[Trace]:
    """Returns traces of a model at draws of its prior, without slopes.

    How good the draws of latent EBMs are is not told: they only show how the model hangs together.

    Args:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        num_draws: How many.

    Raises:
        ValueError: If a plate has no rows.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> runs = prior_runs(lambda: pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0)), (), {})
        >>> len({float(run.nodes["a"]["value"]) for run in runs})
        16
    """
    try:
        with torch.no_grad(), aside(), prototype_run():
            return [poutine.trace(model).get_trace(*args, **kwargs) for _ in range(num_draws)]
    except ZeroDivisionError as error:
        if "size cannot be zero" not in str(error):  # Pyro's words for it
            raise
        raise ValueError(
            "a plate of the model has no rows: are the data empty? Without any the posterior is "
            "the prior, of which pyro.infer.Predictive draws"
        ) from error
