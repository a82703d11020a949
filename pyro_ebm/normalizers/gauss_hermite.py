r"""Log Z of a tilt of a Gaussian, by Gauss–Hermite quadrature in up to three dimensions.

With base :math:`N(m, LL^\top)` and the nodes and weights of the standard normal in each dim,

.. math:: \log Z = \log E_{z \sim N(0, I)}\, e^{-E(m + Lz)} \approx
    \log \sum_k w_k\, e^{-E(m + L z_k)}.

The nodes are those of the base: nothing is searched for, so that the sum is a smooth function of
all parameters and may stand as ``log_normalizer=`` in a model. It converges fast where
:math:`e^{-E}` is smooth on the scale of the base, and badly for modes much narrower than it: there
:func:`~pyro_ebm.normalizers.quadrature` puts its nodes where the mass is.

Its error is taken for the larger change from two rules with fewer nodes. Of one change, sign and
size come and go with the place of a mode between the nodes, and where it passes zero log Z may be
off by many nats; those of n - 1 nodes, which lie between those of n, and of 3 n / 4 do not pass
zero together.

Reference: Golub, Welsch, Calculation of Gauss quadrature rules, Math. of Computation 23, 1969.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.normalizers.held_nodes import HeldNodes
from pyro_ebm.normalizers.laws import law_of, parameters_behind, shared_law
from pyro_ebm.ops.log_normalizer import LogNormalizer

MAX_DIM = 3
MOST_NODES = 150  # in a dim; the outer weights of more are below the smallest double
_NODES = HeldNodes(
    "gauss_hermite",
    "of a law that is too narrow or too far off for the nodes of its base",
    "use more nodes (num_nodes=), quadrature",
)


def gauss_hermite(dist: EnergyDistribution, *, num_nodes: int = 32) -> LogNormalizer:
    """Returns log Z of a distribution with a Gaussian base.

    Args:
        dist: A distribution whose base is Gaussian, of at most three dimensions; of a generalized
            EBM the latents are meant.
        num_nodes: Nodes in each dim, 4 to 150.

    Returns:
        ``LogNormalizer`` of the batch shape, in nats; ``stderr`` is the larger change from fewer
        nodes, and no standard error. In a model log Z is NaN where that is above
        :data:`~.held_nodes.LARGEST_ERROR`.

    Raises:
        ValueError: If the base is not Gaussian, there are more than three dimensions, or
            ``num_nodes`` is out of range.

    Example:
        >>> from torch.distributions import Normal
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, Normal(0.0, 1.0))
        >>> gauss_hermite(law).value  # -log(2) / 2
        tensor(-0.3466, dtype=torch.float64)
    """
    if not 4 <= num_nodes <= MOST_NODES or num_nodes != int(num_nodes):
        raise ValueError(f"num_nodes must be a whole number from 4 to 150, got {num_nodes!r}")
    law = law_of(dist)
    base = _Gaussian.of(law, dist)
    value, change = _with_change(law, base, int(num_nodes))
    centre = base.points(base.loc.new_zeros(1, law.event_shape.numel()))
    parameters = parameters_behind(law, value, centre)
    return _NODES.log_normalizer(value, change, parameters)


def has_gaussian_base(law: EnergyDistribution) -> bool:
    """Whether the nodes can be those of the base."""
    return isinstance(_inner(law.base), Normal | MultivariateNormal)


def _inner(base: Any) -> Any:
    """A base without what ``to_event`` puts around it."""
    while isinstance(base, Independent):
        base = base.base_dist
    return base


def on_base(dist: EnergyDistribution, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Returns log Z of a law that all elements of a batch share, and its change from fewer nodes.

    The energy sees every node once, not once for every element. Both are 0-d.

    Args:
        dist: A distribution as of :func:`gauss_hermite`, whose batch is known to be of one law.
        num_nodes: Nodes in each dim.

    Example:
        >>> from torch.distributions import Normal
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, Normal(torch.zeros(500), 1.0))
        >>> on_base(law, 32)[0]  # -log(2) / 2
        tensor(-0.3466, dtype=torch.float64)
    """
    law = law_of(dist)
    base = _Gaussian.of(law, dist).of_first()
    one = shared_law(law, base.loc, with_base=False)
    value, change = _with_change(one, base, num_nodes)
    return value.flatten()[0], change.flatten()[0]


class _Gaussian:
    """A Gaussian base as an affine map of standard normal coordinates."""

    def __init__(self, loc: Tensor, scale_tril: Tensor, event_shape: torch.Size) -> None:
        self.loc, self.scale_tril, self.event_shape = loc, scale_tril, event_shape

    @classmethod
    def of(cls, law: EnergyDistribution, dist: EnergyDistribution) -> _Gaussian:
        base, size = law.base, law.event_shape.numel()
        if size > MAX_DIM:
            raise ValueError(
                f"gauss_hermite takes up to {MAX_DIM} dimensions, and {dist!r} has {size}: use an "
                "estimate"
            )
        base = _inner(base)
        flat = law.batch_shape + (size,)
        if isinstance(base, MultivariateNormal):
            return cls(base.loc, base.scale_tril, law.event_shape)
        if isinstance(base, Normal):
            loc, scale = (t.reshape(flat) for t in (base.loc, base.scale))
            return cls(loc, torch.diag_embed(scale), law.event_shape)
        raise ValueError(
            f"gauss_hermite integrates against a Gaussian base (Normal or MultivariateNormal), got "
            f"{law.base!r}: use quadrature"
        )

    def of_first(self) -> _Gaussian:
        """Returns the base of the first element of a batch, as a batch of one."""
        loc, scale_tril = self.loc, self.scale_tril
        for dim in range(loc.dim() - 1):
            loc, scale_tril = (t.narrow(dim, 0, 1) for t in (loc, scale_tril))
        return _Gaussian(loc, scale_tril, self.event_shape)

    def points(self, z: Tensor) -> Tensor:
        """Returns the images of nodes ``(N, D)``, ``(N,) + batch + event``."""
        lead = z.shape[:1] + (1,) * (self.loc.dim() - 1)
        x = self.loc + (self.scale_tril @ z.reshape((*lead, -1, 1))).squeeze(-1)
        return x.reshape(x.shape[:-1] + self.event_shape)


def _with_change(law: EnergyDistribution, base: _Gaussian, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Returns log E exp(-E) over the base and its change from fewer nodes, of the batch shape."""
    value = _log_mean(law, base, num_nodes)
    with torch.no_grad():
        changes = [value - _log_mean(law, base, n) for n in (num_nodes - 1, num_nodes * 3 // 4)]
    return value, torch.stack(changes).detach().abs().amax(0)


def _log_mean(law: EnergyDistribution, base: _Gaussian, num_nodes: int) -> Tensor:
    """Returns log E exp(-E) over the base, of the batch shape, in float64."""
    z, log_w = _nodes(num_nodes, law.event_shape.numel(), base.loc)
    values = -law.energy(base.points(z.to(base.loc.dtype))).double()
    return torch.logsumexp(values + log_w.reshape((-1,) + (1,) * (values.dim() - 1)), 0)


def _nodes(num_nodes: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes ``(n^D, D)`` and log weights ``(n^D,)`` of the standard normal, in float64."""
    z, log_w = (torch.as_tensor(row, device=like.device) for row in _rule(num_nodes))
    grid = torch.cartesian_prod(*[z] * dim).reshape(-1, dim)
    return grid, torch.cartesian_prod(*[log_w] * dim).reshape(-1, dim).sum(-1)


@cache
def _rule(num_nodes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and log weights in one dim: an eigenvalue problem, solved once."""
    points, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return points, np.log(weights / weights.sum())
