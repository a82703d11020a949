r"""Energies whose Z is infinite: no way to a posterior may begin with one.

Along a ray :math:`x = r v` in d dimensions :math:`\int e^{-U(rv)} r^{d-1} dr` is finite only if U
grows faster than :math:`d \log r`, that is by more than :math:`d \log 10` from every radius to ten
times as far out. Far outside of the data this is looked at along some rays; it finds densities that
do not fall off, and cannot prove that all others do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.ops.constraints import plain
from pyro_ebm.ops.rng import rng_preserved

_NUM_RAYS = 32
_FAR = (1e2, 1e3, 1e4)  # times the scale of the data


def check_proper(name: str, law: EnergyDistribution, x: Tensor) -> None:
    """Raises if a density on the reals does not fall off.

    Args:
        name: The site.
        law: Its distribution, at some parameters.
        x: Its data, ``sample + batch + event``.

    Raises:
        ValueError: If Z is infinite, by what is seen far out.
    """
    if plain(law.support) is not constraints.real or law.base is not None:
        return
    d = law.event_shape.numel()
    scale = x.detach().abs().max().clamp_min(1.0)
    with rng_preserved(), torch.no_grad():
        rays = torch.randn((_NUM_RAYS,) + (1,) * len(law.batch_shape) + law.event_shape).to(x)
        length = rays.flatten(1).norm(dim=1).reshape((-1,) + (1,) * (rays.dim() - 1))
        heights = [law.potential(radius * scale * rays / length) for radius in _FAR]
    growth = torch.stack([b - a for a, b in zip(heights, heights[1:], strict=False)])
    flat = torch.isfinite(growth) & (growth <= d * math.log(10.0) * (1.0 - 1e-6))
    if bool(flat.all(0).any()):
        raise ValueError(
            f"the energy of site {name!r} is improper: along some directions it does not grow by "
            f"more than {d} log r, so that Z is infinite. Add a term that confines x, or a base"
        )
