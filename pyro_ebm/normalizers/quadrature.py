r"""Log Z by the trapezoidal rule in up to three unconstrained dimensions.

.. math:: \log Z = \log \int e^{-U(T(u))} |\det J_T(u)| \, du \approx \log \Big(h_1 \cdots h_D
    \sum_i e^{-U(T(u_i))} |\det J_T(u_i)|\Big)

On functions that are smooth and die away at both ends the trapezoidal rule converges faster than
any power of the step, so that no other rule is needed. The box is found first, by growing it until
nothing is left at its faces; then the steps are halved until log Z stands still, and the last
change is the error that is stated.

Reference:
    Trefethen, Weideman, The exponentially convergent trapezoidal rule, SIAM Review 56, 2014.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.layers import unvalidated
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc.distribution_target import DistributionTarget
from pyro_ebm.normalizers.laws import law_of, leaves_of
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.spaces import UnconstrainedSpace

MAX_DIM = 3
FIRST_NODES = 33  # along every dim; halving a step of n nodes makes 2 n - 1
MOST_NODES = 2**22
_NEGLIGIBLE = 36.0  # nats below the highest point: exp(-36) is under the rounding of a double
_NUM_STARTS = 64
_GROWTH, _MAX_GROWTHS = 1.5, 60


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
    dist: EnergyDistribution, *, box: Box | None = None, tolerance: float = 1e-9
) -> LogNormalizer:
    """Returns log Z by the trapezoidal rule.

    Args:
        dist: A distribution on a continuous support of at most three dimensions.
        box: Where to put the nodes; found if not given. With a box nothing depends on values, so
            that the sum is differentiable under ``vmap``:
            ``dist.with_log_normalizer(quadrature(dist, box=box))`` inside a model, with the box
            found once by :func:`find_box`.
        tolerance: Nats by which log Z may still move when steps are halved; not less than eight
            roundings of the box's dtype, in which the energy is evaluated.

    Returns:
        ``LogNormalizer`` of the distribution's batch shape; its ``stderr`` is the last change, and
        no standard error.

    Raises:
        ValueError: If there are more than three dimensions.
        NonFiniteEnergyError: If the mass does not end, or no point has any.
        RuntimeError: If log Z still moves at the finest grid.

    Example:
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
        >>> quadrature(law).value  # log(2 pi) / 2
        tensor(0.9189, dtype=torch.float64)
    """
    integrand = _Integrand(dist)
    given = box
    box = find_box(dist) if given is None else given
    tolerance = max(tolerance, 8 * torch.finfo(box.low.dtype).eps)
    value = integrand.log_sum(box)
    if given is not None:
        return integrand.result(value, torch.zeros_like(value.detach()))
    while True:
        box = box.refined()
        if box.num_nodes**integrand.dim > MOST_NODES:
            raise RuntimeError(
                f"{dist!r}: log Z still moves with {MOST_NODES} nodes: the density is too rough "
                "for quadrature"
            )
        old, value = value.detach(), integrand.log_sum(box)
        change = (value.detach() - old).abs()
        if bool((change < tolerance).all()):
            return integrand.result(value, change)


def find_box(dist: EnergyDistribution) -> Box:
    """Returns a box of unconstrained coordinates that holds all of the mass.

    It is grown face by face until the density on each face, relative to the highest one seen, is
    below the rounding of a double. A mode far from all starting points and beyond the box is not
    found.

    Raises:
        NonFiniteEnergyError: If the mass does not end, or no point has any.
    """
    integrand = _Integrand(dist)
    start = integrand.start()
    low, high = start.min(0).values - 1.0, start.max(0).values + 1.0
    for _ in range(_MAX_GROWTHS):
        box = Box(low, high, FIRST_NODES)
        heights = integrand.heights(box)
        top = heights.max()
        if not bool(torch.isfinite(top)):
            raise NonFiniteEnergyError(f"{dist!r}: no node has a finite energy")
        grows = [_open_faces(heights, dim, top - _NEGLIGIBLE) for dim in range(integrand.dim)]
        if not any(below or above for below, above in grows):
            return _trimmed(box, heights, top - 2 * _NEGLIGIBLE)
        width = (_GROWTH - 1.0) * (high - low)
        low = low - width * torch.tensor([below for below, _ in grows]).to(low)
        high = high + width * torch.tensor([above for _, above in grows]).to(low)
    raise NonFiniteEnergyError(
        f"{dist!r}: the mass does not end within {float((high - low).max()):.2g} unconstrained "
        "units: is the energy proper?"
    )


def _open_faces(heights: Tensor, dim: int, floor: Tensor) -> tuple[bool, bool]:
    """Whether the density still reaches the floor at the two faces of a dim."""
    ends = (heights.select(dim, 0), heights.select(dim, -1))
    return bool((ends[0] >= floor).any()), bool((ends[1] >= floor).any())


def _trimmed(box: Box, heights: Tensor, floor: Tensor) -> Box:
    """The box without its empty margins, one node of margin kept."""
    step = (box.high - box.low) / (box.num_nodes - 1)
    low, high = box.low.clone(), box.high.clone()
    for dim in range(heights.dim()):
        counts = heights > floor
        others = tuple(d for d in range(heights.dim()) if d != dim)
        kept = (counts.any(others) if others else counts).nonzero()[:, 0]
        low[dim] = box.low[dim] + step[dim] * max(int(kept[0]) - 1, 0)
        high[dim] = box.low[dim] + step[dim] * min(int(kept[-1]) + 1, box.num_nodes - 1)
    return Box(low, high, box.num_nodes)


class _Integrand:
    """The log density of a law in unconstrained coordinates, in float64.

    The energy is evaluated in the dtype of the nodes: its parameters may have no other.
    """

    def __init__(self, dist: EnergyDistribution) -> None:
        self.law = unvalidated(law_of(dist))
        self.space = UnconstrainedSpace.of(self.law.support, self.law.event_shape)
        self.dim = self.space.size
        if self.dim > MAX_DIM:
            raise ValueError(
                f"quadrature takes up to {MAX_DIM} dimensions, and {dist!r} has {self.dim}: use "
                "an estimate"
            )

    def start(self) -> Tensor:
        """Where to look first: draws of the base, or points spread over the support, ``(N, D)``."""
        return DistributionTarget(self.law).draw_start(_NUM_STARTS).reshape(-1, self.dim)

    def log_density(self, u: Tensor) -> Tensor:
        """Returns the log of the integrand at ``(N, D)``, ``(N,) + batch``."""
        lead = u.shape[:1] + torch.Size((1,) * len(self.law.batch_shape))
        x, log_det = self.space.with_log_det(u.reshape(lead + (self.dim,)))
        return (log_det - self.law.potential(x)).double()

    def heights(self, box: Box) -> Tensor:
        """The highest density over the batch at every node, as a grid; NaN counts as nothing."""
        with torch.no_grad():
            values = self.log_density(box.nodes()[0])
        values = torch.where(values.isnan(), -torch.inf, values).reshape(len(values), -1)
        return values.max(1).values.reshape((box.num_nodes,) * self.dim)

    def log_sum(self, box: Box) -> Tensor:
        """Returns the rule's value of log Z, of the batch shape."""
        nodes, log_volume = box.nodes()
        return torch.logsumexp(self.log_density(nodes), 0) + log_volume

    def result(self, value: Tensor, change: Tensor) -> LogNormalizer:
        """Returns the value with its last change."""
        return LogNormalizer(value, change, "quadrature", parameters=leaves_of(self.law))
