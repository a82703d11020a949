r"""MMD: a generator trained by comparing its draws with the data, without an adversary.

For data :math:`x_i`, draws :math:`y_l` of a generator and a kernel k the loss is the U-statistic

.. math:: \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{M(M-1)} \sum_{l \ne k} k(y_l, y_k)
    - \frac{2}{nM} \sum_{il} k(x_i, y_l),

unbiased for :math:`\mathrm{MMD}^2 \ge 0`, so that it may come out negative; so are its gradients on
mini-batches.

What is trained is *the law that draws*: the guide's site of the same name (a
``PushforwardDistribution``, or any law with ``rsample``), else the base of the EBM, which for a
``GeneralizedEBM`` is its generator. The energy takes no part and receives no gradient: a
generator may be fitted by MMD first and its energy by KALE after, on one model. The loss is in
units of the kernel, not in nats: it is no likelihood, nor does it learn log Z.

References:
    Li, Swersky, Zemel, Generative moment matching networks, ICML 2015, arXiv:1502.02761;
    Gretton, Borgwardt, Rasch, Schoelkopf, Smola, A kernel two-sample test, JMLR 13, 2012.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, PushforwardDistribution
from pyro_ebm.infer.contrast import Contrast, contrast_law, rows_of
from pyro_ebm.infer.objective import Objective
from pyro_ebm.ops.kernels import GaussianKernel, RadialKernel, median_distance
from pyro_ebm.ops.rng import rng_preserved

MULTIPLES = (0.5, 1.0, 2.0)  # of the median distance, so that no single length decides
MOST_FOR_MEDIAN = 1000


class SampleComparison(Objective):
    """What objectives share that compare a generator's draws with data by a kernel.

    Args:
        kernel: The kernel; ``None`` fits a sum of Gaussians to the first batch, with lengths of
            half, once and twice its median distance.
        num_base: Draws per batch, rounded up to a multiple of its rows; ``None`` draws as many as
            there are rows.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.
    """

    needs_density = False
    trains_energy = False
    is_held_out_criterion = True
    num_particles: int

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
        self._fits_kernel = kernel is None

    def get_extra_state(self) -> Any:
        """Returns the lengths of a fitted kernel, which belong to the state."""
        fitted = self._fits_kernel and self.kernel is not None
        return self.kernel.lengthscales if fitted else None  # type: ignore[union-attr]

    def set_extra_state(self, state: Any) -> None:
        """Restores a fitted kernel."""
        if state is not None:
            self.kernel = GaussianKernel(*state)

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws from the generator, with gradients where they are enabled."""
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

    def freeze(
        self, model: Callable[..., Any], *args: Any, guide: Any = None, **kwargs: Any
    ) -> Any:
        """Raises: its draws move with the parameters, so there is nothing to hold."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot be frozen: what it compares with data is drawn from the "
            "generator that it trains. Freeze KALE or NCE for Bayes over an energy"
        )

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
        """Returns the kernel, fitted to these data if there is none yet."""
        if self.kernel is None:
            self.kernel = _fitted(data, type(self).__name__)
        return self.kernel

    def _loss(
        self, name: str, p: EnergyDistribution, x: Tensor, noise: Any, log_z: Tensor | None
    ) -> Tensor:
        if self.vectorize_particles and self.num_particles > 1:
            raise ValueError(
                f"{type(self).__name__} pools the rows of a site, so that vectorized particles "
                "would pair a datum with its own copies: say vectorize_particles=False"
            )
        contrast = self.draw(p, x, noise)  # with gradients: the draws are what is trained
        if self._is_check_due(name):
            _check_rows_alike(name, p, x, noise, type(self).__name__)
        return self.per_datum(p, x, contrast, x.new_zeros(()))


class MMD(SampleComparison):
    r"""The squared maximum mean discrepancy as a loss for a generator.

    Args:
        kernel: As for :class:`SampleComparison`; large data sets of one kind want one fixed kernel.
        num_base: As for :class:`SampleComparison`.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If a batch has one row, or the law that draws has no gradients.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_ebm.distributions import GeneralizedEBM
        >>> def model(data):
        ...     shift = pyro.param("shift", torch.tensor(0.0))
        ...     gebm = GeneralizedEBM(lambda z: z + shift, dist.Normal(0.0, 1.0), lambda x: x**2)
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("x", gebm, obs=data)
        >>> data = torch.randn(300) + 2
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.1}), loss=MMD())
        >>> losses = [svi.step(data) for _ in range(100)]
        >>> abs(pyro.param("shift").item() - 2) < 0.3
        True
    """

    def compare(self, data: Tensor, draws: Tensor) -> Tensor:
        """Returns the terms of the U-statistic, in units of the kernel."""
        if min(len(data), len(draws)) < 2:
            raise ValueError(
                f"MMD compares rows with each other, got {len(data)} data and {len(draws)} draws: "
                "put the data in a plate, or use a larger batch"
            )
        kernel = self.kernel_for(data)
        values = _mean_of_others(kernel(data, data)) - 2.0 * kernel(data, draws).mean(1)
        values = values + _mean_of_others(kernel(draws, draws)).mean()
        self.evaluation.note(mmd2=values.mean())
        return values


def _mean_of_others(gram: Tensor) -> Tensor:
    """The mean of every row without its diagonal: the kernel of a point with itself is no pair."""
    return (gram.sum(1) - gram.diagonal()) / (len(gram) - 1)


def _as_vectors(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1)


def _count(p: EnergyDistribution, x: Tensor) -> int:
    return max(1, rows_of(p, x).numel())


def _fitted(data: Tensor, who: str) -> RadialKernel:
    rows = data.detach()[:MOST_FOR_MEDIAN]
    median = float(median_distance(rows)) if len(rows) > 1 else 0.0
    if not median > 0:
        raise ValueError(
            f"{who} fits its kernel to the median distance between the rows of the first batch, "
            f"got {median} from {len(data)} rows: pass kernel=GaussianKernel(lengthscale)"
        )
    return GaussianKernel(*(c * median for c in MULTIPLES))


@torch.no_grad()
def _check_rows_alike(name: str, p: EnergyDistribution, x: Tensor, noise: Any, who: str) -> None:
    """Raises if a generator depends on more of a row than its latent.

    Draws and data are pooled, so a law that differs from row to row would be fitted to their mix.
    """
    law = contrast_law(noise, p, x, needs_density=False, who=who)
    if p.conditional is False or not isinstance(law, PushforwardDistribution):
        return
    with rng_preserved():
        z = law.prior.sample()
        out = law.generator(z)
        for dim in range(len(law.batch_shape)):
            moved = law.generator(z.roll(1, dim))
            same = torch.allclose(moved, out.roll(1, dim), rtol=1e-3, atol=1e-4, equal_nan=True)
            if not same and torch.allclose(law.generator(z), out, equal_nan=True):
                raise ValueError(
                    f"the generator of EBM site {name!r} depends on row-wise values other than its "
                    f"latent, but {who} pools all rows and would fit their mixture: append the "
                    "context to the data and to the draws, or say conditional=False if this is "
                    "wrong"
                )
