r"""Kernel Stein discrepancy as a loss: the score at pairs of rows, and no second derivative.

.. math:: L = n\, \widehat{\mathrm{KSD}}^2 = \frac1n \sum_{i,j} k_p(x_i, x_j), \qquad
    k_p(x, y) = s(x) \cdot s(y)\, k + s(x) \cdot \nabla_y k + s(y) \cdot \nabla_x k
    + \operatorname{tr} \nabla_x \nabla_y k, \qquad s = -\nabla U,

the V-statistic over all pairs, so that L is never negative. It is quadratic in the parameters of an
exponential family. With the inverse multiquadric :math:`k = (1 + r^2 / \ell^2)^{-1/2}` it detects
mass that runs away; it is as blind as score matching to the weights of separated modes. A row
enters in n pairs, so a total loss is of the whole data set: mini-batches estimate another one.

All rows are draws of one law. Contexts of two rows are independent of each other, so that what the
scores of a pair say of a covariate's slope averages out: conditional energies are refused.

On a constrained support all of it is meant in the unconstrained coordinates.

References:
    Matsubara, Knoblauch, Briol, Oates, Robust generalised Bayesian inference for intractable
    likelihoods, JRSS B 84, 2022. arXiv:2104.07359;
    Gorham, Mackey, Measuring sample quality with kernels, ICML 2017. arXiv:1703.01717.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring.conditional import depends_on_rows
from pyro_ebm.infer.scoring.deterministic import DeterministicObjective
from pyro_ebm.infer.scoring.second_derivatives import check_second_derivatives
from pyro_ebm.infer.scoring.unconstrained import Unconstrained, check_interior
from pyro_ebm.ops.arguments import one_of
from pyro_ebm.ops.kernels import (
    GaussianKernel,
    InverseMultiquadricKernel,
    RadialKernel,
    median_distance,
)
from pyro_ebm.ops.stein_kernel import stein_kernel

KernelName = Literal["imq", "rbf"]

MAX_FOR_MEDIAN = 300  # rows whose distances set the length scale


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
        ValueError: If the kernel is unknown, the length scale not positive, there is one row, or
            rows have laws or weights of their own.
        NotImplementedError: On a support that is not continuous.

    Example:
        >>> p = EnergyDistribution(lambda x: 0.5 * (x - 1) ** 2, event_shape=())
        >>> loss = KernelStein(length_scale=1.0)
        >>> loss.row_losses(p, torch.tensor([1.0, 1.0])).sum()  # s = 0: twice the trace, 1
        tensor(2.)
    """

    degree = 2

    def __init__(
        self, kernel: KernelName = "imq", *, length_scale: float | None = None, **elbo: Any
    ) -> None:
        super().__init__(**elbo)
        if length_scale is not None and not length_scale > 0:
            raise ValueError(f"length_scale must be positive, got {length_scale!r}")
        self.kernel = one_of("kernel", kernel, ("imq", "rbf"))
        self.length_scale = length_scale

    def pooled_by(self, site: str) -> str | None:
        """Says that a row is compared with all rows of a site alike."""
        return (
            "compares each with all rows alike: use ScoreMatching, or repeat rows as often as they "
            "count"
        )

    def check(self, name: str, p: EnergyDistribution, x: Tensor) -> None:
        """Raises ``ValueError`` if rows have laws of their own, or lie on the support's border."""
        if p.conditional or (p.conditional is None and depends_on_rows(p, p.broadcast_value(x))):
            raise ValueError(
                f"the energy of EBM site {name!r} depends on row-wise values other than x, and "
                "KernelStein compares all rows as draws of one law: use ScoreMatching, or say "
                "conditional=False if this is wrong"
            )
        check_interior(name, p, p.broadcast_value(x), "KernelStein")
        check_second_derivatives(name, p, x, "KernelStein")

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> None:
        """Draws nothing.

        Raises:
            ValueError: If data lie on the support's border.
        """
        check_interior(self.evaluation.site, p, x, "KernelStein")

    def row_losses(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the mean of the Stein kernel between a row and all rows that count.

        Raises:
            ValueError: If there is one row.
            NotImplementedError: On a support that is not continuous.
        """
        space = Unconstrained(p, "KernelStein")
        u = space.coordinates(p.broadcast_value(x))
        rows = space.rows(u)
        score = space.score(u).reshape(rows.numel(), -1)
        u = u.reshape(score.shape)
        if len(u) < 2:
            raise ValueError(
                "KernelStein compares rows with each other, got 1 row: put the data in a plate, or "
                "use ScoreMatching"
            )
        counts = u.new_ones(len(u)) if mask is None else mask.expand(rows).reshape(-1).to(u.dtype)
        pairs = stein_kernel(u, score, self._kernel_for(u, counts))
        return (pairs @ counts / counts.sum()).reshape(rows)

    def _kernel_for(self, u: Tensor, counts: Tensor) -> RadialKernel:
        length = self.length_scale
        scale = _typical_distance(u, counts) if length is None else length
        return InverseMultiquadricKernel(scale) if self.kernel == "imq" else GaussianKernel(scale)


def _typical_distance(u: Tensor, counts: Tensor) -> Tensor:
    """The median distance of two rows that count; 1 where all rows are the same."""
    median = median_distance(u[:MAX_FOR_MEDIAN], counts[:MAX_FOR_MEDIAN])
    return torch.where(median > 0, median, 1.0)
