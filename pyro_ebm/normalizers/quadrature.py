r"""Log Z by the trapezoidal rule in up to three unconstrained dimensions.

.. math:: \log Z = \log \int e^{-U(T(u))} |\det J_T(u)| \, du \approx \log \Big(h_1 \cdots h_D
    \sum_i e^{-U(T(u_i))} |\det J_T(u_i)|\Big)

On functions that are smooth and die away at both ends the trapezoidal rule converges faster than
any power of the step, so that no other rule is needed. The box is found first: around the peaks
that are reached from some hundred points, grown until nothing is left at its faces, with nodes as
near to each other as the narrowest peak is wide. Then the steps are halved until log Z stands
still, and the last change is the error that is stated. It knows nothing of a mode that the search
did not reach, one that is narrow and far from the others: draws that are known to be of it, such as
data, say where to search.

Reference:
    Trefethen, Weideman, The exponentially convergent trapezoidal rule, SIAM Review 56, 2014.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.layers import unvalidated
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.normalizers.growth import check_grows
from pyro_ebm.normalizers.held_nodes import MAX_DIM, HeldNodes
from pyro_ebm.normalizers.laws import check_dims, check_inside, law_of, on_reals, parameters_behind
from pyro_ebm.normalizers.peaks import Peaks, find_peaks, scattered
from pyro_ebm.ops.dtypes import Dtypes
from pyro_ebm.ops.initial_points import like_of
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.log_space import NEGLIGIBLE
from pyro_ebm.ops.nan_energies import NaNCount
from pyro_ebm.ops.spaces import UnconstrainedSpace

FIRST_NODES = 33  # along every dim; halving a step of n nodes makes 2 n - 1
MAX_NODES = 2**22
_NUM_STARTS, _MAX_DRAWS = 64, 4096
_GROWTH, _MAX_GROWTHS = 1.5, 60
_MIN_ROUNDINGS = 2.0  # of a place, as wide as a mode there must be
# Waves in so many steps from which on the largest size counts: of half a wave a step alone, those
# that come to lie on each other may cancel. With these a kink at a node is told as it is.
_PERIOD, _HALF, _QUARTER = 22, 9, 5
_NODES = HeldNodes(
    "quadrature",
    "of a law that is too narrow or too wide for a box",
    "use box.refined(), a wider box, infer.posterior",
)


class UnresolvedError(RuntimeError):
    """Log Z still moves at the finest grid: tails too heavy for one, or the density too rough."""


@dataclass(frozen=True)
class Box:
    """A box of unconstrained coordinates.

    Args:
        low: Its lower corner, ``(D,)``; its dtype is that of the nodes.
        high: Its upper corner, ``(D,)``.
        num_nodes: Nodes along every dim.
    """

    low: Tensor
    high: Tensor
    num_nodes: int

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Returns all nodes ``(n^D, D)`` and the log of a node's volume, 0-d."""
        share = torch.linspace(0.0, 1.0, self.num_nodes, dtype=self.low.dtype)
        axes = [a + share.to(a.device) * (b - a) for a, b in zip(self.low, self.high, strict=True)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        step = (self.high - self.low) / (self.num_nodes - 1)
        return grid.reshape(-1, len(self.low)), step.double().log().sum()

    def refined(self) -> Box:
        """Returns the same box with steps half as long."""
        return Box(self.low, self.high, 2 * self.num_nodes - 1)


def quadrature(
    dist: EnergyDistribution,
    *,
    box: Box | None = None,
    draws: Tensor | None = None,
    tolerance: float = 1e-9,
) -> LogNormalizer:
    """Returns log Z by the trapezoidal rule.

    Args:
        dist: A distribution on a continuous support of at most three dimensions.
        box: Where to put the nodes; found if not given. With a box nothing depends on values, so
            that the sum is differentiable under ``vmap``:
            ``dist.with_log_normalizer(quadrature(dist, box=box))`` inside a model. It must hold for
            the whole posterior: take that of the widest law there (:func:`find_box`), and
            ``box.refined()`` until ``stderr`` of the narrowest one is small, too.
            :func:`pyro_ebm.infer.posterior` finds its boxes itself.
        draws: Values of the law, ``lead + event_shape``, such as draws or data: the search for the
            box begins there, too, at no more than 4096 of them that are evenly spaced.
        tolerance: Nats by which log Z may still move when steps are halved; not less than eight
            roundings of the box's dtype, in which the energy is evaluated.

    Returns:
        ``LogNormalizer`` of the distribution's batch shape; its ``stderr`` is the last change, in a
        box what :func:`on_box` says, and no standard error. In a model log Z in a box is NaN where
        that is above :data:`~.held_nodes.MAX_ERROR`.

    Raises:
        NotImplementedError: If the support is not continuous.
        ValueError: If there are more than three dimensions, draws are NaN or not on the support,
            the energy depends on values whose dims are not those of the distribution's batch, or it
            refuses nodes by a ``validate_args=True`` of its own.
        NonFiniteEnergyError: If the mass does not end, or no point has any.
        UnresolvedError: If log Z still moves at the finest grid.

    Example:
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
        >>> quadrature(law).value  # log(2 pi) / 2
        tensor(0.9189, dtype=torch.float64)
    """
    integrand = _Integrand(dist)
    integrand.check_dims(box)
    if box is not None:
        value, error = integrand.with_error(box)
        return _NODES.log_normalizer(value, error, integrand.parameters(value, box))
    check_grows(integrand.law)
    peaks = integrand.peaks(draws)
    box = _box_around(integrand, peaks, 2 * NEGLIGIBLE)
    tolerance = max(tolerance, 8 * torch.finfo(box.low.dtype).eps)
    value, seen = integrand.counted_sum(box)
    while True:
        box = box.refined()
        if box.num_nodes**integrand.dim > MAX_NODES:
            raise _unresolved(integrand, box, peaks, seen)
        old = value.detach()
        value, seen = integrand.counted_sum(box)
        change = (value.detach() - old).abs()
        if bool((change < tolerance).all()):
            remarks, parameters = seen.remarks + _rounded(peaks), integrand.parameters(value, box)
            return LogNormalizer(
                value, change, "quadrature", remarks=remarks, parameters=parameters
            )


def _rounded(peaks: Peaks) -> tuple[str, ...]:
    """What to say of peaks that are hardly wider than the roundings of where they are."""
    least = _MIN_ROUNDINGS * torch.finfo(peaks.at.dtype).eps * peaks.at.abs()
    if bool((peaks.width >= least).all()):
        return ()
    return (
        f"a mode is hardly wider than {peaks.at.dtype} resolves there: give parameters in float64",
    )


def _unresolved(integrand: _Integrand, box: Box, peaks: Peaks, seen: NaNCount) -> UnresolvedError:
    """What to say of log Z that does not stand still at the finest grid."""
    steps, width = (box.high - box.low) / (box.num_nodes - 1), peaks.width.amin(0)
    reach = f"{float((box.high - box.low).max()):.2g}"
    if seen.number:
        why = seen.remarks[0]
    elif bool((steps > 0.5 * width).any()):
        why = (
            f"its mass reaches over {reach} unconstrained units, with parts "
            f"{float(width.min()):.2g} wide: tails too heavy, or modes too narrow, for a grid. Use "
            "importance with a proposal whose tails are as heavy, or a base"
        )
    else:
        why = f"the density is too rough for quadrature in {box.low.dtype}: use an estimate"
    return UnresolvedError(f"{integrand.law!r}: log Z still moves with {MAX_NODES} nodes: {why}")


def on_box(dist: EnergyDistribution, box: Box) -> tuple[Tensor, Tensor]:
    r"""Returns log Z by the nodes of a box, and about how far it may be off, ``batch_shape`` each.

    The error of the rule is the Fourier transform of the density at whole waves a step. Of it the
    nodes show what it is at half a wave, H say, and at a quarter, Q, and the error is taken for
    :math:`H^2 / (2 Q - H)`: right where errors fall as a power of the step, and large where they
    fall faster. Sizes of waves are taken, not their values at some nodes, which would tell nothing
    or far too much wherever the mass comes to lie badly between the nodes. To it is added the share
    of the mass at the faces, as if it went on for another box. Nothing branches on values, so that
    both stand under ``vmap``.

    Args:
        dist: A distribution on a continuous support of at most three dimensions.
        box: Where the nodes are.

    Raises:
        ValueError: If there are more than three dimensions.

    Example:
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
        >>> low, high = torch.tensor([[-9.0], [9.0]], dtype=torch.float64)
        >>> value, error = on_box(law, Box(low, high, 41))
        >>> value, bool(error < 1e-9)
        (tensor(0.9189, dtype=torch.float64), True)
        >>> bool(on_box(law, Box(low / 4, high / 4, 41))[1] > 0.1)  # mass is left at its faces
        True
    """
    return _Integrand(dist).with_error(box)


def _of_rule(mass: Tensor, dim: int) -> Tensor:
    """The error of a sum over a grid in nats, by the waves that its shares show, of the batch."""
    size = torch.fft.rfftn(_folded(mass, dim), dim=tuple(range(dim))).abs()
    half, quarter = (_largest(size, dim, least) for least in (_HALF, _QUARTER))
    return half * half / (2.0 * quarter - half)


def _folded(mass: Tensor, dim: int) -> Tensor:
    """The sums over nodes a period apart, from which its waves are those of the whole grid."""
    for d in range(dim):
        missing = (*mass.shape[:d], -mass.shape[d] % _PERIOD, *mass.shape[d + 1 :])
        mass = torch.cat([mass, mass.new_zeros(missing)], d).unflatten(d, (-1, _PERIOD)).sum(d)
    return mass


def _largest(size: Tensor, dim: int, least: int) -> Tensor:
    """The largest size of waves that are so fast along some dim, of the batch."""
    counted = torch.as_tensor(_are_fast(dim, least), device=size.device)
    counted = counted.reshape(counted.shape + (1,) * (size.dim() - dim))
    return (size * counted).flatten(0, dim - 1).amax(0)


@cache
def _are_fast(dim: int, least: int) -> NDArray[np.float64]:
    """One for waves that are so fast along some dim, else zero; half of those of the last dim."""
    waves = np.minimum(np.arange(_PERIOD), _PERIOD - np.arange(_PERIOD))
    axes = [*[waves] * (dim - 1), waves[: _PERIOD // 2 + 1]]
    fastest = np.stack(np.meshgrid(*axes, indexing="ij")).max(0)
    return (fastest >= least).astype(np.float64)


def _outside(mass: Tensor, dim: int) -> Tensor:
    """The share of the mass beyond the faces if it went on as there, of the batch."""
    faces = [mass.select(d, end) for d in range(dim) for end in (0, -1)]
    shares = [face.flatten(0, dim - 2).sum(0) if dim > 1 else face for face in faces]
    return mass.shape[0] * torch.stack(shares).sum(0)


def find_box(
    dist: EnergyDistribution, *, depth: float = 2 * NEGLIGIBLE, draws: Tensor | None = None
) -> Box:
    """Returns a box of unconstrained coordinates that holds all of the mass.

    From the peaks that are found it is grown face by face until the density on each face, relative
    to the highest one seen, is below the rounding of a double. Its nodes are as near to each other
    as the narrowest peak is wide, as far as :data:`MAX_NODES` allow.

    Args:
        dist: The distribution.
        depth: Nats below the highest density at which the box ends.
        draws: Values of the law, ``lead + event_shape``: the search begins there, too.

    Raises:
        ValueError: If draws are NaN or not on the support.
        NonFiniteEnergyError: If the mass does not end, or no point has any.
    """
    integrand = _Integrand(dist)
    return _box_around(integrand, integrand.peaks(draws), depth)


def _box_around(integrand: _Integrand, peaks: Peaks, depth: float) -> Box:
    inner = (peaks.at - peaks.width).amin(0), (peaks.at + peaks.width).amax(0)
    low, high = inner
    for _ in range(_MAX_GROWTHS):
        box = Box(low, high, FIRST_NODES)
        heights = integrand.heights(box)
        top = torch.maximum(heights.max(), peaks.height.max())
        grows = [_open_faces(heights, dim, top - NEGLIGIBLE) for dim in range(integrand.dim)]
        if not any(below or above for below, above in grows):
            return _resolving(_trimmed(box, heights, top - depth, inner), peaks)
        width = (_GROWTH - 1.0) * (high - low)
        low = low - width * torch.tensor([below for below, _ in grows]).to(low)
        high = high + width * torch.tensor([above for _, above in grows]).to(low)
    check_grows(integrand.law)
    reach = f"{float((high - low).max()):.2g}"
    instead = (
        ""
        if low.dtype == torch.float64
        else " In float32 it may be hidden at a singular edge of the support, and end in float64: "
        "torch.set_default_dtype(torch.float64), parameters and base alike"
    )
    raise NonFiniteEnergyError(
        f"{integrand.law!r}: the mass does not end within {reach} unconstrained units: is the "
        f"energy proper?{instead}"
    )


def _open_faces(heights: Tensor, dim: int, floor: Tensor) -> tuple[bool, bool]:
    """Whether the density still reaches the floor at the two faces of a dim."""
    ends = (heights.select(dim, 0), heights.select(dim, -1))
    return bool((ends[0] >= floor).any()), bool((ends[1] >= floor).any())


def _resolving(box: Box, peaks: Peaks) -> Box:
    """The box with nodes no further from each other than any peak is wide, if so many may be."""
    narrowest = peaks.width.amin(0)
    while bool(((box.high - box.low) / (box.num_nodes - 1) > narrowest).any()):
        if box.refined().num_nodes ** len(box.low) > MAX_NODES:
            return box
        box = box.refined()
    return box


def _trimmed(box: Box, heights: Tensor, floor: Tensor, inner: tuple[Tensor, Tensor]) -> Box:
    """The box without its empty margins, one node of margin kept, and all of an inner one."""
    step = (box.high - box.low) / (box.num_nodes - 1)
    low, high = box.low.clone(), box.high.clone()
    for dim in range(heights.dim()):
        counts = heights > floor
        others = tuple(d for d in range(heights.dim()) if d != dim)
        kept = (counts.any(others) if others else counts).nonzero()[:, 0]
        if len(kept) == 0:  # all mass lies between nodes
            continue
        low[dim] = box.low[dim] + step[dim] * max(int(kept[0]) - 1, 0)
        high[dim] = box.low[dim] + step[dim] * min(int(kept[-1]) + 1, box.num_nodes - 1)
    return Box(torch.minimum(low, inner[0]), torch.maximum(high, inner[1]), box.num_nodes)


class _Integrand:
    """The log density of a law in unconstrained coordinates, in float64.

    The energy is evaluated in the dtype of the nodes: its parameters may have no other. Far nodes
    lie where supports end by rounding, so that distributions in it are not to check them.
    """

    def __init__(self, dist: EnergyDistribution) -> None:
        self.law = unvalidated(on_reals(law_of(dist), "quadrature"))
        self.space = UnconstrainedSpace.of(self.law.support, self.law.event_shape)
        self.dim = self.space.size
        if self.dim > MAX_DIM:
            raise ValueError(
                f"quadrature takes up to {MAX_DIM} dimensions, and {dist!r} has {self.dim}: use "
                "an estimate"
            )

    def check_dims(self, box: Box | None) -> None:
        """Raises if the energy depends on values with dims of their own."""
        like = like_of(self.law.energy_function) if box is None else box.low
        check_dims(self.law, self.space.to_support(like.new_zeros(self.dim)))

    def peaks(self, draws: Tensor | None) -> Peaks:
        """Where the density is high, by a search from the base or the support, and from draws."""
        own = DistributionTarget(self.law).draw_start(_NUM_STARTS).reshape(-1, self.dim)
        own = self._with_digits(own)
        starts = [own, scattered(own)]
        if draws is not None:
            u = self._positions(draws).to(own)
            starts.append(u[:: -(-len(u) // _MAX_DRAWS)])
            starts.append(scattered(u))
        found = find_peaks(self._highest, torch.cat(starts))
        if len(found.at) == 0:
            raise NonFiniteEnergyError(f"{self.law!r}: no node has a finite energy")
        return found

    def _with_digits(self, u: Tensor) -> Tensor:
        """Points in double precision where the energy has such parameters, else as they are.

        A 0-d tensor does not make the energies double, but has digits that single nodes lose.
        """
        with torch.no_grad(), Dtypes() as seen, suppress(RuntimeError):  # a product of two dtypes
            self._potential(u[:1])
        if torch.float64 in seen.dtypes:
            with torch.no_grad(), suppress(RuntimeError):
                if self._potential(u[:1].double())[0].dtype == torch.float64:
                    return u.double()
        return u

    def _positions(self, draws: Tensor) -> Tensor:
        """Unconstrained coordinates of values, ``(N, D)``, those without finite ones left out."""
        if draws.shape[draws.dim() - len(self.law.event_shape) :] != self.law.event_shape:
            raise ValueError(
                f"draws must end in the event shape {tuple(self.law.event_shape)}, got "
                f"{tuple(draws.shape)}"
            )
        u = self.space.to_unconstrained(check_inside(self.law, draws)).reshape(-1, self.dim)
        return u[u.isfinite().all(1)]

    def _highest(self, u: Tensor) -> Tensor:
        """The highest log density over the batch, ``(N,)``."""
        return self.log_density(u).reshape(len(u), -1).amax(1)

    def log_density(self, u: Tensor) -> Tensor:
        """Returns the log of the integrand at ``(N, D)``, ``(N,) + batch``."""
        potential, log_det = self._potential(u)
        return (log_det - potential).double()

    def _potential(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The potential at points, and the log of the Jacobian of the way to the support."""
        lead = u.shape[:1] + torch.Size((1,) * len(self.law.batch_shape))
        x, log_det = self.space.with_log_det(u.reshape(lead + (self.dim,)))
        try:
            with pyro.validation_enabled(is_validate=False):
                return self.law.potential(x), log_det
        except ValueError as error:
            if "within the support" not in str(error):
                raise
            raise ValueError(
                f"{self.law!r}: a distribution in its energy refuses nodes that rounding puts at "
                "the edge of the support: give it validate_args=False"
            ) from error

    def heights(self, box: Box) -> Tensor:
        """The highest density over the batch at every node, as a grid; NaN counts as nothing."""
        with torch.no_grad():
            values = self.log_density(box.nodes()[0])
        values = torch.where(values.isnan(), -torch.inf, values).reshape(len(values), -1)
        return values.max(1).values.reshape((box.num_nodes,) * self.dim)

    def with_error(self, box: Box) -> tuple[Tensor, Tensor]:
        """Returns what :func:`on_box` does."""
        nodes, log_volume = box.nodes()
        heights = self.log_density(nodes)
        total = torch.logsumexp(heights, 0)
        shares = (heights.detach() - total.detach()).exp()
        grid = shares.reshape((box.num_nodes,) * self.dim + shares.shape[1:])
        return total + log_volume, _of_rule(grid, self.dim) + _outside(grid, self.dim)

    def counted_sum(self, box: Box) -> tuple[Tensor, NaNCount]:
        """Returns the rule's value of log Z with NaN counted as nothing, and how often that was."""
        nodes, log_volume = box.nodes()
        seen = NaNCount()
        return torch.logsumexp(-seen(-self.log_density(nodes)), 0) + log_volume, seen

    def parameters(self, value: Tensor, box: Box) -> tuple[Tensor, ...]:
        """Returns what a log Z from the nodes of a box depends on."""
        with torch.no_grad():
            x = self.space.to_support(box.low[None])
        return parameters_behind(self.law, value, x)
