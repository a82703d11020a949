r"""Energies whose Z is infinite: no way to a posterior may begin with one.

Along a ray :math:`x = r v` in d dimensions :math:`\int e^{-U(rv)} r^{d-1} dr` is finite only if U
grows faster than :math:`d \log r`, that is by more than :math:`d \log 10` from every radius to ten
times as far out. Far outside of the data this is looked at along some rays, at draws of the
parameters from their prior; it finds densities that do not fall off, and cannot prove that all
others do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, unwrap
from pyro_ebm.ops.constraints import plain
from pyro_ebm.ops.rng import rng_preserved

NUM_DRAWS = 16  # of the prior
_NUM_RAYS = 32
_UNBOUNDED = (constraints.real, constraints.positive, constraints.nonnegative)
_FAR = (1e2, 1e3, 1e4)  # times the scale of the data


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
    with rng_preserved(), torch.no_grad(), poutine.block():
        for _ in range(NUM_DRAWS):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
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
    if law is None or law.is_normalized or isinstance(law, GeneralizedEBM):
        return False
    return plain(law.support) in _UNBOUNDED and _stays_flat(law, site["value"])


def _stays_flat(law: EnergyDistribution, x: Tensor) -> bool:
    d = law.event_shape.numel()
    scale = torch.where(torch.isfinite(x), x, 0.0).abs().max().clamp_min(1.0)  # padding may be NaN
    rays = torch.randn((_NUM_RAYS,) + (1,) * len(law.batch_shape) + law.event_shape).to(x)
    rays = rays if plain(law.support) is constraints.real else rays.abs()
    length = rays.flatten(1).norm(dim=1).reshape((-1,) + (1,) * (rays.dim() - 1))
    heights = [law.potential(radius * scale * rays / length) for radius in _FAR]
    growth = torch.stack([b - a for a, b in zip(heights, heights[1:], strict=False)])
    flat = torch.isfinite(growth) & (growth <= d * math.log(10.0) * (1.0 - 1e-6))
    return bool(flat.all(0).any())
