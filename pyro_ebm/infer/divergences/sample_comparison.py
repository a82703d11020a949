r"""The part that kernel comparisons of a generator's draws with the data have in common.

For data :math:`x_i` and draws :math:`y_l` of a generator a kernel gives the loss, one value per
datum, of all rows of a batch together. What is trained is *the law that draws*: the guide's site of
the same name (a ``PushforwardDistribution``, or any law with ``rsample``), else the base of the
EBM. The energy takes no part and receives no gradient; nor is there a log Z.

A kernel that is not given is fitted to every site's first batch: a sum of Gaussians with lengths of
half, once and twice the median distance between its rows, so that no single length decides.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring.conditional_generators import check_generator
from pyro_ebm.infer.scoring.contrast import Contrast, contrast_law, rows_of
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.ops.kernels import MULTIPLES, GaussianKernel, RadialKernel, median_distance

MAX_FOR_MEDIAN = 1000


class SampleComparison(Objective):
    """What objectives share that compare a generator's draws with data by a kernel.

    Args:
        kernel: The kernel; ``None`` fits a sum of Gaussians to the first batch, with lengths of
            half, once and twice its median distance.
        num_base: Draws per batch, rounded up to a multiple of its rows; ``None`` draws as many as
            there are rows.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        TypeError: If the kernel is none.
        ValueError: If ``num_base`` is not positive.
    """

    needs_density = False
    trains_energy = False
    why_not_frozen = (
        "what it compares with data is drawn from the generator that it trains. Freeze KALE or NCE "
        "for Bayes over an energy"
    )

    def __init__(
        self, kernel: RadialKernel | None = None, num_base: int | None = None, **elbo: Any
    ) -> None:
        super().__init__(**elbo)
        if kernel is not None and not isinstance(kernel, RadialKernel):
            raise TypeError(
                f"kernel must be a RadialKernel such as GaussianKernel(1.0), got {kernel!r}"
            )
        if num_base is not None and num_base < 1:
            raise ValueError(f"num_base must be a positive number of draws or None, got {num_base}")
        self.kernel = kernel
        self.num_base = num_base

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws from the generator, with gradients where they are enabled.

        Raises:
            ValueError: If the law that draws cannot do so with gradients, or has no parameters.
            TypeError: If the data are integers.
        """
        law = contrast_law(noise, p, x, needs_density=False, who=type(self).__name__)
        if not law.has_rsample:
            raise ValueError(
                f"{type(self).__name__} trains the law that draws, but {type(law).__name__} cannot "
                "draw with gradients: use a PushforwardDistribution as the guide's site or a "
                "GeneralizedEBM in the model"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} compares data by their distances, got {x.dtype}: learn "
                "discrete data with PseudoLikelihood or EnergyDiscrepancy"
            )
        per_row = 1 if self.num_base is None else math.ceil(self.num_base / _count(p, x))
        points = law.rsample(torch.Size((per_row,)))
        if torch.is_grad_enabled() and not points.requires_grad:
            raise ValueError(
                f"{type(self).__name__} trains the law that draws, but {type(law).__name__} has no "
                "parameters that require grad, and the energy takes no part: use KALE to learn an "
                "energy, or call this under torch.no_grad() to evaluate"
            )
        return Contrast(points.to(x.dtype))

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns the loss, one value per datum; zero for rows that do not count."""
        num_dims = len(rows_of(p, x))
        data = self.evaluation.rows(x, num_dims)
        draws = self.evaluation.rows(contrast.points, num_dims + 1)
        values = self.compare(_as_vectors(data), _as_vectors(draws))
        if self.evaluation.mask is None:
            return values.reshape(rows_of(p, x))
        mask = self.evaluation.mask.expand(rows_of(p, x))
        return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, values)

    @abstractmethod
    def compare(self, data: Tensor, draws: Tensor) -> Tensor:
        """Returns the loss of data ``(n, d)`` and draws ``(N, d)``, one value per datum."""

    def kernel_for(self, data: Tensor) -> RadialKernel:
        """Returns the kernel, at first sight of a site fitted to these data if none is given."""
        if self.kernel is not None:
            return self.kernel
        site = self.evaluation.site
        if site not in self.fitted:
            self.fitted[site] = _fitted_lengths(data, type(self).__name__)
        return GaussianKernel(*self.fitted[site])

    def site_loss(
        self, name: str, p: EnergyDistribution, x: Tensor, noise: Any, log_z: Tensor | None
    ) -> Tensor:
        """Returns the loss per datum of draws that have gradients; there is no log Z."""
        if self.vectorize_particles and self.num_particles > 1:
            raise ValueError(
                f"{type(self).__name__} pools the rows of a site, so that vectorized particles "
                "would pair a datum with its own copies: say vectorize_particles=False"
            )
        contrast = self.draw(p, x, noise)  # with gradients: the draws are what is trained
        if self.is_check_due(name):
            check_generator(name, p, x, noise, type(self).__name__)
        return self.per_datum(p, x, contrast, x.new_zeros(()))


def _as_vectors(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1)


def _count(p: EnergyDistribution, x: Tensor) -> int:
    return max(1, rows_of(p, x).numel())


def _fitted_lengths(data: Tensor, who: str) -> tuple[float, ...]:
    rows = data.detach()[:MAX_FOR_MEDIAN]
    median = float(median_distance(rows)) if len(rows) > 1 else 0.0
    if not median > 0:
        raise ValueError(
            f"{who} fits its kernel to the median distance between the rows of the first batch, "
            f"got {median} from {len(data)} rows: pass kernel=GaussianKernel(lengthscale)"
        )
    return tuple(c * median for c in MULTIPLES)
