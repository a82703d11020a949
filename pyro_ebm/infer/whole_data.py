"""A posterior by Bayes' rule counts every row of its EBM sites once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine

from pyro_ebm.distributions import unwrap
from pyro_ebm.infer.run_modules import aside
from pyro_ebm.poutine.whole_data import check_site_unscaled


def check_unscaled(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str
) -> None:
    """Raises if an observed EBM site is scaled, which leaves no posterior by Bayes' rule.

    Args:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        what: What was asked for, as the beginning of a sentence.

    Raises:
        ValueError: If one is; the message names the site.
    """
    with aside():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"] and unwrap(site["fn"]) is not None:
            check_site_unscaled(
                site, f"{what} counts every row once (method='generalized' weighs its loss by it)"
            )
