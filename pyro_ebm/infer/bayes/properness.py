r"""Energies whose Z is infinite: no way to a posterior may begin with one.

Every density on the reals is followed far outside of its data, at draws of the parameters from
their prior, as ``normalizers.growth`` describes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from pyro_ebm.distributions import unwrap
from pyro_ebm.infer.bayes.prior_runs import NUM_DRAWS, prior_runs
from pyro_ebm.normalizers.growth import stays_flat


def check_proper(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, ...]:
    """Raises if a density on the reals does not fall off, wherever its parameters are.

    Args:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        A sentence on each site whose density does not fall off at some draws of the prior only.

    Raises:
        ValueError: If Z of a site is infinite at all draws, by what is seen far out.
    """
    found: Counter[str] = Counter()
    with torch.no_grad():
        for trace in prior_runs(model, args, kwargs):
            found.update(n for n in trace.observation_nodes if _is_improper(trace.nodes[n]))
    for name, number in found.items():
        if number == NUM_DRAWS:
            raise ValueError(
                f"the energy of site {name!r} is improper: along some directions it does not grow "
                "faster than (dims) log r, so that Z is infinite. Add a term that confines x, or "
                "a base"
            )
    return tuple(
        f"at {number} of {NUM_DRAWS} draws of the prior Z of site {name!r} is infinite; the prior "
        "should keep away from there."
        for name, number in found.items()
    )


def _is_improper(site: Any) -> bool:
    law = unwrap(site["fn"])
    return law is not None and not law.is_normalized and stays_flat(law, site["value"])
