r"""Energies whose Z is infinite, by how slowly they grow far out.

Along a ray :math:`x = r v` in d dimensions :math:`\int e^{-U(rv)} r^{d-1} dr` is finite only if U
grows faster than :math:`d \log r`, that is by more than :math:`d \log 10` from every radius to ten
times as far out: this is looked at along random rays. A *ridge*, as that of :math:`(x_1 - x_2)^2`,
no random ray meets. In a few dims U is therefore followed through tubes of constant width, where it
has to grow faster than :math:`\log r`: along coordinates, sums and differences of two of them, and
the directions in which gradients far out do not point. A tube, and not a line, as a ridge may
become so narrow far out that its mass is finite; and one with its middle near 0, as tubes that lie
far out to the side may run across a bent valley (a funnel, a banana), where U is so large that it
underflows or rounds to a constant.

This finds densities that do not fall off, and cannot prove that all others do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.ops.constraints import plain
from pyro_ebm.ops.initial_points import like_of
from pyro_ebm.ops.module_calls import buffers_restored
from pyro_ebm.ops.rng import rng_preserved

SCALE_UNKNOWN = 1e4  # beyond this, in any units of one's own, lies nothing that is modelled
_NUM_RAYS = 32
_UNBOUNDED = (constraints.real, constraints.positive, constraints.nonnegative)
_FAR = (1e2, 1e3, 1e4)  # times the scale of the data
_PLACES = (1.7, 2.3, 3.1, 3.7, 5.3, 6.1, 7.9)  # within a decade, where it is looked at again
_NEAR = 1e-3  # in the units of x
_ROUNDING = 8.0  # of a difference of two energies, in units of eps times the larger
_MAX_DIM, _MAX_PAIRED = 16, 8  # dims of ridges along coordinates, and along pairs of them
_MAX_NUMBERS = 2**23  # in tubes of all rows at once; more are not looked at
_NUM_OFFSETS = 2  # places in a tube, besides its middle
_WITHOUT_BASE = (
    "far from 0 the energy does not grow faster than (dims) log r along some directions, so that Z "
    "would be infinite: is the energy proper? Add a term that confines x, or a base"
)
_WITH_BASE = (
    "far from 0 the energy falls as fast as the base's log density does, to within (dims) log r, "
    "or faster, along some directions, so that Z would be infinite: is the energy proper? Bound it "
    "from below, add a term that confines x, or take a base with lighter tails"
)
_WAY_OUT = "If you know that Z is finite, set energy.is_proper = True, and nothing is asked"


def check_grows(law: EnergyDistribution) -> None:
    """Raises if the density of a law, its base included, is seen to be too flat for a finite Z.

    Args:
        law: The law. Nothing is asked of bounded supports, and of energies that know log Z, have an
            attribute ``is_proper`` that is true, or fail far outside of 1e4 and the base's draws.

    Raises:
        NonFiniteEnergyError: If it is.

    Example:
        >>> import pyro.distributions as dist
        >>> check_grows(EnergyDistribution(lambda x: -0.2 * x, dist.Normal(0.0, 1.0)))
        >>> check_grows(EnergyDistribution(lambda x: -0.2 * x, dist.StudentT(5.0)))
        Traceback (most recent call last):
        ...
        pyro_ebm.errors.NonFiniteEnergyError: ...is the energy proper?...
    """
    is_known = law.is_exact_energy or getattr(law.energy_function, "is_proper", False)
    if not is_known and _is_seen_flat(law):
        why = _WITHOUT_BASE if law.base is None else _WITH_BASE
        raise NonFiniteEnergyError(f"{law!r}: {why}. {_WAY_OUT}")


def _is_seen_flat(law: EnergyDistribution) -> bool:
    """The same of a law whose data are not known; an energy that fails says so where it is used."""
    with rng_preserved(), buffers_restored(), torch.no_grad():
        try:
            return stays_flat(law, _scale_of(law))
        except Exception:  # of any kind, so far out
            return False


def _scale_of(law: EnergyDistribution) -> Tensor:
    """Numbers of the law's scale and dtype, by its base."""
    if law.base is None:
        return like_of(law.energy_function).new_full((), SCALE_UNKNOWN)
    drawn: Tensor = law.base.sample(torch.Size((_NUM_RAYS,)))
    return drawn.abs().clamp_min(SCALE_UNKNOWN)


@torch.no_grad()
def stays_flat(law: EnergyDistribution, x: Tensor) -> bool:
    """Whether a density on an unbounded support is seen not to fall off far outside of data.

    Args:
        law: The distribution.
        x: Its data, or anything of their scale and dtype.

    Example:
        >>> def ridge(x):
        ...     return (x[..., 0] - x[..., 1]) ** 2
        >>> stays_flat(EnergyDistribution(ridge, event_shape=(2,)), torch.zeros(2))
        True
        >>> confined = EnergyDistribution(lambda x: (x**2).sum(-1), event_shape=(2,))
        >>> stays_flat(confined, torch.zeros(2))
        False
    """
    if isinstance(law, GeneralizedEBM) or plain(law.support) not in _UNBOUNDED:
        return False
    scale = torch.where(torch.isfinite(x), x, 0.0).abs().max().clamp_min(1.0)  # padding may be NaN
    far = _Far(law, scale)
    return far.cone_is_flat() or far.tube_is_flat()


class _Far:
    """A law far outside of its data.

    Rays are ``(R,) + rows + event_shape``, with rows of the batch's number of dims.

    Args:
        law: The law.
        scale: The scale of its data, 0-d, of their dtype.
    """

    def __init__(self, law: EnergyDistribution, scale: Tensor) -> None:
        self.law, self.scale = law, scale
        self.dim = law.event_shape.numel()
        self.is_signed = plain(law.support) is constraints.real

    def cone_is_flat(self) -> bool:
        """Whether the density falls off too slowly around a random ray."""
        rays = _unit(self._inside(self._of_rows(torch.randn(_NUM_RAYS, self.dim))), self.dim)
        return bool(self._stay_flat(rays, self._near(rays), self.dim).any())

    def tube_is_flat(self) -> bool:
        """Whether it falls off too slowly in a tube along one of the likely ridges."""
        if not 1 < self.dim <= _MAX_DIM:
            return False
        rays = [self._of_rows(_likely_ridges(self.dim, is_signed=self.is_signed))]
        number = _NUM_OFFSETS * len(rays[0]) * self.law.batch_shape.numel() * self.dim
        if number > _MAX_NUMBERS:
            return False
        rays += [self._without_gradient()] if self.is_signed else []
        rows = torch.broadcast_shapes(*(r.shape[1:] for r in rays))
        along = torch.cat([r.expand(len(r), *rows) for r in rays])
        flat = self._stay_flat(along, self._near(along), 1)
        for _ in range(_NUM_OFFSETS):
            offsets = self._inside(self._of_rows(torch.randn(len(along), self.dim)))
            flat &= self._stay_flat(along, offsets, 1)
        return bool(flat.any())

    def _of_rows(self, rays: Tensor) -> Tensor:
        """The same rays ``(R, d)`` for all rows."""
        ones = (1,) * len(self.law.batch_shape)
        return rays.to(self.scale).reshape((-1,) + ones + self.law.event_shape)

    def _inside(self, rays: Tensor) -> Tensor:
        return rays if self.is_signed else rays.abs()

    def _near(self, like: Tensor) -> Tensor:
        """Places next to 0, where energies may be infinite."""
        return self._inside(_NEAR / self.scale * torch.randn(like.shape).to(like))

    def _stay_flat(self, rays: Tensor, offsets: Tensor, dim: int) -> Tensor:
        """Whether U grows by no more than ``dim log r`` along rays from their offsets, by row.

        From all places within a decade: an energy that oscillates falls from some of them.
        """
        flat = self._are_flat(rays, offsets, dim)
        for place in _PLACES:
            if not bool(flat.any()):
                break
            flat = flat & self._are_flat(place * rays, offsets, dim)
        return flat

    def _are_flat(self, rays: Tensor, offsets: Tensor, dim: int) -> Tensor:
        """The same from one place within a decade, the length of the rays.

        A fall counts where it ends in a density that is not negligible beside that at the offset:
        a straight line through a bent valley falls, too.
        """
        rays, offsets = self.scale * rays, self.scale * offsets
        offsets = (_FAR[-1] * rays + offsets) - _FAR[-1] * rays  # as they round at the far end
        heights = torch.stack([self.law.potential(r * rays + offsets) for r in (0.0, *_FAR)])
        bound = dim * math.log(10.0) + _rounding(heights[2:])
        growth = heights[1:].diff(dim=0)
        rise, most = heights[-1] - heights[0], self.dim * float((self.scale * _FAR[-1]).log())
        counts = (growth >= -bound).all(0) | (rise <= most + _rounding(heights[-1]))
        return (torch.isfinite(growth) & (growth <= bound)).all(0) & counts

    def _without_gradient(self) -> Tensor:
        """Principal directions of gradients far out; along a ridge there are none."""
        law, event = self.law, self.law.event_shape
        points = self._of_rows(torch.randn(2 * self.dim, self.dim)) * self.scale * _FAR[0]
        points = points.expand((-1,) + law.batch_shape + event).clone().requires_grad_()
        with torch.enable_grad():
            heights = law.potential(points).sum()
        slope = torch.zeros_like(points)
        if heights.requires_grad:
            (slope,) = torch.autograd.grad(heights, points, materialize_grads=True)
        slope = _unit(slope.nan_to_num(0.0, 0.0, 0.0), self.dim)
        slope = slope.reshape((-1,) + law.batch_shape + (self.dim,)).movedim(0, -1)
        directions = torch.linalg.eigh(slope @ slope.mT)[1].movedim(-1, 0)
        directions = directions.reshape((self.dim,) + law.batch_shape + event)
        return torch.cat([directions, -directions])


def _likely_ridges(dim: int, *, is_signed: bool) -> Tensor:
    """Unit vectors along coordinates, and along sums and differences of two of them."""
    axes = torch.eye(dim)
    found = [axes]
    if dim <= _MAX_PAIRED:
        one, other = torch.triu_indices(dim, dim, 1)
        found += [axes[one] + axes[other]] + [axes[one] - axes[other]] * is_signed
    along = torch.nn.functional.normalize(torch.cat(found))
    return torch.cat([along, -along]) if is_signed else along


def _rounding(heights: Tensor) -> Tensor:
    return _ROUNDING * torch.finfo(heights.dtype).eps * heights.abs()


def _unit(x: Tensor, dim: int) -> Tensor:
    """Events of length one; those of length zero stay."""
    flat = x.reshape(-1, dim)
    length = flat.norm(dim=1, keepdim=True)
    return torch.where(length > 0, flat / length, flat).reshape(x.shape)
