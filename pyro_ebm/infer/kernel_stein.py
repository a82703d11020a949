r"""Kernel Stein discrepancy as a loss: the score at pairs of rows, and no second derivative.

.. math:: L = n\, \widehat{\mathrm{KSD}}^2 = \frac1n \sum_{i,j} k_p(x_i, x_j), \qquad
    k_p(x, y) = s(x) \cdot s(y)\, k + s(x) \cdot \nabla_y k + s(y) \cdot \nabla_x k
    + \operatorname{tr} \nabla_x \nabla_y k, \qquad s = -\nabla U,

the V-statistic over all pairs, so that L is never negative. It is quadratic in the parameters of an
exponential family. With the inverse multiquadric :math:`k = (1 + r^2 / \ell^2)^{-1/2}` it detects
mass that runs away; it is as blind as score matching to the weights of separated modes. A row
enters in n pairs, so a total loss is of the whole data set: mini-batches estimate another one.

On a constrained support all of it is meant in the unconstrained coordinates.

References:
    Matsubara, Knoblauch, Briol, Oates, Robust generalised Bayesian inference for intractable
    likelihoods, JRSS B 84, 2022. arXiv:2104.07359;
    Gorham, Mackey, Measuring sample quality with kernels, ICML 2017. arXiv:1703.01717.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.deterministic import DeterministicObjective
from pyro_ebm.infer.unconstrained import Unconstrained

KernelName = Literal["imq", "rbf"]

MOST_FOR_MEDIAN = 300  # rows whose distances set the length scale


class KernelStein(DeterministicObjective):
    r"""n times the squared kernel Stein discrepancy of a site's rows; it draws nothing.

    Its cost is quadratic in the number of rows: a few thousand at most.

    Args:
        kernel: ``"imq"``, the inverse multiquadric, or ``"rbf"``, the Gaussian
            :math:`e^{-r^2 / 2 \ell^2}`.
        length_scale: :math:`\ell` in units of the (unconstrained) data; the median distance of the
            first 300 rows if not given.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If the kernel is unknown, the length scale not positive, or there is one row.
        NotImplementedError: On a support that is not continuous.

    Example:
        >>> p = EnergyDistribution(lambda x: 0.5 * (x - 1) ** 2, event_shape=())
        >>> loss = KernelStein(length_scale=1.0)
        >>> loss.loss(p, torch.tensor([1.0, 1.0])).sum()  # s = 0: twice the trace, 1
        tensor(2.)
    """

    degree = 2

    def __init__(
        self, kernel: KernelName = "imq", *, length_scale: float | None = None, **elbo: Any
    ) -> None:
        super().__init__(**elbo)
        if kernel not in ("imq", "rbf"):
            raise ValueError(f"kernel must be 'imq' or 'rbf', got {kernel!r}")
        if length_scale is not None and not length_scale > 0:
            raise ValueError(f"length_scale must be positive, got {length_scale!r}")
        self.kernel = kernel
        self.length_scale = length_scale

    def loss(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the mean of the Stein kernel between a row and all rows that count."""
        space = Unconstrained(p, "KernelStein")
        u = space.coordinates(p.broadcast_value(x))
        rows = u.shape[: u.dim() - space.event_dim]
        score = space.score(u).reshape(rows.numel(), -1)
        u = u.reshape(score.shape)
        if len(u) < 2:
            raise ValueError(
                "KernelStein compares rows with each other, got 1 row: put the data in a plate, or "
                "use ScoreMatching"
            )
        counts = u.new_ones(len(u)) if mask is None else mask.expand(rows).reshape(-1).to(u.dtype)
        pairs = self._pairs(u, counts)
        return (_row_sums(u, score, pairs, counts) / counts.sum()).reshape(rows)

    def _pairs(self, u: Tensor, counts: Tensor) -> _Pairs:
        squared = (u[:, None] - u).square().sum(-1)
        if self.length_scale is None:
            scale = _median_distance(squared, counts).square()
        else:
            scale = u.new_tensor(self.length_scale**2)
        maker = _multiquadric if self.kernel == "imq" else _gaussian
        return maker(squared / scale, scale, u.shape[-1])


class _Pairs(NamedTuple):
    """A radial kernel at all pairs, ``(n, n)`` each."""

    kernel: Tensor
    slope: Tensor  # a, where the gradient in x is a (x - y)
    trace: Tensor  # of the mixed second derivative


def _multiquadric(squared: Tensor, scale: Tensor, dim: int) -> _Pairs:
    v = 1.0 + squared
    k = v.rsqrt()
    trace = (dim / v - 3.0 * squared / v.square()) * k / scale
    return _Pairs(k, -k / v / scale, trace)


def _gaussian(squared: Tensor, scale: Tensor, dim: int) -> _Pairs:
    k = (-0.5 * squared).exp()
    return _Pairs(k, -k / scale, (dim - squared) * k / scale)


def _row_sums(u: Tensor, score: Tensor, pairs: _Pairs, counts: Tensor) -> Tensor:
    """Sums the Stein kernel of every row over all that count, without an ``(n, n, d)`` array."""
    weigh = counts[:, None]
    products = (score * (pairs.kernel @ (weigh * score))).sum(-1)
    inner = (score * u).sum(-1)
    of_y = (score * (pairs.slope @ (weigh * u))).sum(-1) - inner * (pairs.slope @ counts)
    of_x = (u * (pairs.slope @ (weigh * score))).sum(-1) - pairs.slope @ (counts * inner)
    return products + of_y + of_x + pairs.trace @ counts


def _median_distance(squared: Tensor, counts: Tensor) -> Tensor:
    """The median distance of two rows that count; 1 where all rows are the same."""
    near = squared[:MOST_FOR_MEDIAN, :MOST_FOR_MEDIAN]
    both = counts[: len(near), None] * counts[: len(near)]
    both = both * (1.0 - torch.eye(len(near), dtype=both.dtype, device=both.device))
    median = torch.where(both > 0, near, torch.nan).nanmedian().sqrt()
    return torch.where(median > 0, median, 1.0)
