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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.gaussian_base import GaussianBase
from pyro_ebm.normalizers.held_nodes import MAX_DIM, HeldNodes
from pyro_ebm.normalizers.laws import check_dims, law_of, parameters_behind, shared_law
from pyro_ebm.ops.log_normalizer import LogNormalizer

MAX_NODES = 150  # in a dim; the outer weights of more are below the smallest double
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
        :data:`~.held_nodes.MAX_ERROR`.

    Raises:
        ValueError: If the base is not Gaussian, there are more than three dimensions,
            ``num_nodes`` is out of range, or the energy depends on values whose dims are not those
            of the distribution's batch.

    Example:
        >>> from torch.distributions import Normal
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, Normal(0.0, 1.0))
        >>> gauss_hermite(law).value  # -log(2) / 2
        tensor(-0.3466, dtype=torch.float64)
    """
    if not 4 <= num_nodes <= MAX_NODES or num_nodes != int(num_nodes):
        raise ValueError(f"num_nodes must be a whole number from 4 to 150, got {num_nodes!r}")
    law = law_of(dist)
    base = _base_of(law, dist)
    centre = base.points(torch.zeros_like(base.loc).unsqueeze(0))
    check_dims(law, centre.reshape((-1,) + law.event_shape)[0])
    value, change = _with_change(law, base, int(num_nodes))
    parameters = parameters_behind(law, value, centre)
    return _NODES.log_normalizer(value, change, parameters)


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
    base = _base_of(law, dist).of_first()
    one = shared_law(law, base.loc, with_base=False)
    value, change = _with_change(one, base, num_nodes)
    return value.flatten()[0], change.flatten()[0]


def _base_of(law: EnergyDistribution, dist: EnergyDistribution) -> GaussianBase:
    """Returns the base of a law with few dims, or raises."""
    size = law.event_shape.numel()
    if size > MAX_DIM:
        raise ValueError(
            f"gauss_hermite takes up to {MAX_DIM} dimensions, and {dist!r} has {size}: use an "
            "estimate"
        )
    base = GaussianBase.of(law.base)
    if base is None:
        raise ValueError(
            f"gauss_hermite integrates against a Gaussian base (Normal or MultivariateNormal), got "
            f"{law.base!r}: use quadrature"
        )
    return base


def _with_change(
    law: EnergyDistribution, base: GaussianBase, num_nodes: int
) -> tuple[Tensor, Tensor]:
    """Returns log E exp(-E) over the base and its change from fewer nodes, of the batch shape."""
    value = _log_mean(law, base, num_nodes)
    with torch.no_grad():
        fewer = (num_nodes - 1, min(num_nodes * 3 // 4, num_nodes - 2))  # of 4 nodes 3 and 2
        changes = [value - _log_mean(law, base, n) for n in fewer]
    return value, torch.stack(changes).detach().abs().amax(0)


def _log_mean(law: EnergyDistribution, base: GaussianBase, num_nodes: int) -> Tensor:
    """Returns log E exp(-E) over the base, of the batch shape, in float64."""
    z, log_w = _nodes(num_nodes, law.event_shape.numel(), base.loc)
    z = z.to(base.loc.dtype).reshape((len(z),) + (1,) * (base.loc.dim() - 1) + z.shape[1:])
    values = -law.energy(base.points(z)).double()
    return torch.logsumexp(values + log_w.reshape((-1,) + (1,) * (values.dim() - 1)), 0)


def _nodes(num_nodes: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes ``(n^D, D)`` and log weights ``(n^D,)`` of the standard normal, in float64."""
    z, log_w = (torch.as_tensor(row, device=like.device) for row in rule(num_nodes))
    grid = torch.cartesian_prod(*[z] * dim).reshape(-1, dim)
    return grid, torch.cartesian_prod(*[log_w] * dim).reshape(-1, dim).sum(-1)


@cache
def rule(num_nodes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns nodes and log weights in one dim: an eigenvalue problem, solved once."""
    points, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return points, np.log(weights / weights.sum())
