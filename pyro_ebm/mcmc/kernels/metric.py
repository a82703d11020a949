r"""The metric: coordinates in which a target looks alike in all directions.

Kernels move in whitened coordinates :math:`z = R^{-1} q`, where :math:`R R^\top` estimates the
covariance of the target; R is kept as its diagonal, ``(D,)``, or as a lower triangle, ``(D, D)``.
Momenta are those of z and standard normal. Three estimates, each pooled over chains and iterations:

* *diagonal*: the variances;
* *fisher*: :math:`\sqrt{\mathrm{Var}\, q_i / \mathrm{Var}\, \partial_i U}`, the same on a
  Gaussian with independent coordinates, and less moved by correlations;
* *dense*: the covariance. Hundreds of chains know it well, and it turns valleys off the axes into
  round bowls; a step costs :math:`D^2` more operations.

References:
    Hird, Livingstone, Quantifying the effectiveness of linear preconditioning in Markov chain Monte
    Carlo, 2023, arXiv:2312.04898; Seyboldt, Carlson, Carpenter, Preconditioning Hamiltonian Monte
    Carlo by minimizing Fisher divergence, 2026, arXiv:2603.18845 (the Fisher diagonal).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import State
from pyro_ebm.ops.adaptation import PooledCovariance, PooledVariance

METRICS = ("auto", "diagonal", "fisher", "dense")
MAX_DENSE_DIM = 256
_SMALL = 1e-3  # what few draws are shrunk towards
_WEIGHT = 5.0


def stretched(z: Tensor, root: Tensor) -> Tensor:
    """Returns R z, rows ``(C, D)``: a whitened displacement in the target's coordinates."""
    return z * root if root.dim() == 1 else z @ root.T


def pulled_back(gradient: Tensor, root: Tensor) -> Tensor:
    """Returns R^T g: the gradient in whitened coordinates."""
    return gradient * root if root.dim() == 1 else gradient @ root


def whitened(x: Tensor, root: Tensor) -> Tensor:
    """Returns R^-1 x."""
    if root.dim() == 1:
        return x / root
    return torch.linalg.solve_triangular(root, x.T, upper=False).T


def resolved(metric: str, num_chains: int, dim: int) -> str:
    """Returns what ``"auto"`` means: dense where the chains of one iteration span the space.

    Args:
        metric: Its name; any but ``"auto"`` is returned as it is.
        num_chains: C.
        dim: D.
    """
    if metric != "auto":
        return metric
    return "dense" if 1 < dim <= min(num_chains, MAX_DENSE_DIM) else "diagonal"


class MetricEstimate:
    """Learns R from the states that chains pass through.

    Args:
        metric: ``"diagonal"``, ``"fisher"`` or ``"dense"``.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._positions = PooledCovariance() if metric == "dense" else PooledVariance()
        self._gradients = PooledVariance()

    def update(self, state: State) -> None:
        """Adds the chains' present states."""
        self._positions.update(state.position)
        if self.metric == "fisher":
            self._gradients.update(state.gradient)

    def root(self, like: Tensor) -> Tensor:
        """Returns R, shrunk towards a thousandth as long as little was seen."""
        if isinstance(self._positions, PooledCovariance):
            return _dense_root(self._positions).to(like.dtype)
        variance = self._positions.variance[0]
        if self.metric == "fisher":
            variance = (variance / self._gradients.variance[0]).sqrt()
        return _shrunk(variance, self._positions.count).sqrt().to(like.dtype)


def _shrunk(variance: Tensor, count: int) -> Tensor:
    share = count / (count + _WEIGHT)
    return share * variance + _SMALL * (1.0 - share)


def _dense_root(pooled: PooledCovariance) -> Tensor:
    """The Cholesky factor; of a covariance that is not definite to rounding, that of its diagonal.

    Chains that all stand still in a direction leave it without a variance.
    """
    covariance = pooled.covariance
    diagonal = covariance.diagonal()
    share = pooled.count / (pooled.count + _WEIGHT)
    covariance = share * covariance + _SMALL * (1.0 - share) * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )
    root, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed) or not bool(torch.isfinite(root).all()):
        safe = torch.where(diagonal.isfinite() & (diagonal > 0), diagonal, 1.0)
        return _shrunk(safe, pooled.count).sqrt().diag()
    return root
