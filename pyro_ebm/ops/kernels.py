r"""Radial kernels, their conventions and the functions they span.

With :math:`r = \lVert x - y \rVert` and a length scale :math:`\ell` in the units of x,

.. math::
    k_{\mathrm{Gauss}} = \sum_c e^{-r^2 / 2 \ell_c^2}, \qquad
    k_{\mathrm{imq}} = (1 + r^2 / \ell^2)^{-1/2}.

Texts that write the Gaussian as :math:`e^{-r^2/\sigma}` mean :math:`\ell = \sqrt{\sigma/2}`. Every
kernel is a function :math:`\varphi(r^2)`, so that with :math:`a = 2\varphi'(r^2)`

.. math:: \nabla_x k = a\,(x - y), \qquad
    \operatorname{tr} \nabla_x \nabla_y^\top k = -a\,d - 4 r^2 \varphi''(r^2) .

References:
    Gretton, Borgwardt, Rasch, Schoelkopf, Smola, A kernel two-sample test, JMLR 13, 2012.
    Gorham, Mackey, Measuring sample quality with kernels, ICML 2017, arXiv:1703.01717.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MULTIPLES",
    "GaussianKernel",
    "InverseMultiquadricKernel",
    "KernelFunction",
    "RadialKernel",
    "mean_difference",
    "median_distance",
    "squared_distances",
]

Length = float | Tensor

MULTIPLES = (0.5, 1.0, 2.0)
"""Of the median distance: length scales of a sum, so that no single one decides."""


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Returns the squared Euclidean distances of all pairs of rows, ``(n, m)``.

    By one matrix product, about the mean of ``y``: far from the origin it would lose digits.

    Args:
        x: Rows, ``(n, d)``.
        y: Rows, ``(m, d)``.

    Example:
        >>> squared_distances(torch.tensor([[0.0], [3.0]]), torch.zeros(1, 1))
        tensor([[0.],
                [9.]])
    """
    origin = y.detach().mean(0)
    x, y = x - origin, y - origin
    lengths = x.square().sum(-1)[:, None] + y.square().sum(-1)
    return (lengths - 2.0 * x @ y.mT).clamp_min(0.0)  # rounding may leave -1e-7


def median_distance(x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Returns the median Euclidean distance between two different rows, 0-d, the lower of two.

    Args:
        x: Rows, ``(n, d)``, at least two.
        counts: Weights ``(n,)``; rows of weight zero do not count.

    Returns:
        The median; zero where half of the pairs coincide, NaN where no pair counts.

    Example:
        >>> median_distance(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor(2.)
    """
    first, second = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(x.detach(), x.detach(), compute_mode=exact)[first, second]
    if counts is None:
        return distance.median()
    both = counts[first] * counts[second] > 0
    return torch.where(both, distance, torch.nan).nanmedian()


class RadialKernel(ABC):
    """A kernel of the squared distance; called on two sets of rows it gives all pairs."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the kernel of all pairs of rows of ``(n, d)`` and ``(m, d)``, ``(n, m)``."""
        return self.value(squared_distances(x, y))

    @abstractmethod
    def value(self, squared: Tensor) -> Tensor:
        """Returns the kernel at squared distances."""

    @abstractmethod
    def slope(self, squared: Tensor) -> Tensor:
        """Returns a, where the gradient in x is ``a (x - y)``."""

    @abstractmethod
    def trace(self, squared: Tensor, dim: int) -> Tensor:
        """Returns the trace of the mixed second derivative in ``dim`` dimensions."""


class GaussianKernel(RadialKernel):
    r"""The Gaussian :math:`e^{-r^2 / 2 \ell^2}`, or a sum of several.

    Args:
        *lengthscales: The lengths, in units of x.

    Raises:
        ValueError: If there is no length or one is not positive.

    Example:
        >>> GaussianKernel(1.0)(torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]))
        tensor([[0.3679]])
    """

    def __init__(self, *lengthscales: Length) -> None:
        if not lengthscales:
            raise ValueError("GaussianKernel needs at least one length scale, got none")
        self.lengthscales = tuple(_length("GaussianKernel", s) for s in lengthscales)

    def value(self, squared: Tensor) -> Tensor:
        """Returns the kernel at squared distances."""
        return torch.stack([torch.exp(squared / (-2.0 * s * s)) for s in self.lengthscales]).sum(0)

    def slope(self, squared: Tensor) -> Tensor:
        """Returns a, where the gradient in x is ``a (x - y)``."""
        parts = [torch.exp(squared / (-2.0 * s * s)) / (-s * s) for s in self.lengthscales]
        return torch.stack(parts).sum(0)

    def trace(self, squared: Tensor, dim: int) -> Tensor:
        """Returns the trace of the mixed second derivative in ``dim`` dimensions."""
        scaled = [(squared / (s * s), s * s) for s in self.lengthscales]
        return torch.stack([torch.exp(-0.5 * r2) * (dim - r2) / s2 for r2, s2 in scaled]).sum(0)

    def __repr__(self) -> str:
        return f"GaussianKernel({', '.join(f'{float(s):.4g}' for s in self.lengthscales)})"


class InverseMultiquadricKernel(RadialKernel):
    r"""The inverse multiquadric :math:`(1 + r^2 / \ell^2)^{-1/2}`, whose tails are heavy.

    Args:
        lengthscale: The length, in units of x.

    Raises:
        ValueError: If it is not positive.

    Example:
        >>> InverseMultiquadricKernel(1.0)(torch.zeros(1, 1), torch.tensor([[3.0 ** 0.5]]))
        tensor([[0.5000]])
    """

    def __init__(self, lengthscale: Length) -> None:
        self.lengthscale = _length("InverseMultiquadricKernel", lengthscale)

    def value(self, squared: Tensor) -> Tensor:
        """Returns the kernel at squared distances."""
        return (1.0 + squared / self._square).rsqrt()

    def slope(self, squared: Tensor) -> Tensor:
        """Returns a, where the gradient in x is ``a (x - y)``."""
        v = 1.0 + squared / self._square
        return -v.rsqrt() / v / self._square

    def trace(self, squared: Tensor, dim: int) -> Tensor:
        """Returns the trace of the mixed second derivative in ``dim`` dimensions."""
        scaled = squared / self._square
        v = 1.0 + scaled
        return (dim / v - 3.0 * scaled / v.square()) * v.rsqrt() / self._square

    @property
    def _square(self) -> Length:
        return self.lengthscale * self.lengthscale

    def __repr__(self) -> str:
        return f"InverseMultiquadricKernel({float(self.lengthscale):.4g})"


def _length(who: str, value: Length) -> Length:
    if not isinstance(value, Tensor) and not value > 0:  # a look at a tensor would break vmap
        raise ValueError(f"{who}: a length scale must be positive, got {value!r}")
    return value


class KernelFunction(NamedTuple):
    r"""A function :math:`f(x) = \sum_j w_j k(c_j, x)` of the kernel's space.

    Args:
        centres: The points :math:`c_j`, ``(n, d)``.
        weights: The weights :math:`w_j`, ``(n,)``.
        kernel: The kernel.

    Example:
        >>> f = KernelFunction(torch.zeros(1, 2), torch.ones(1), GaussianKernel(1.0))
        >>> f(torch.zeros(3, 2)), f.gradient(torch.tensor([[1.0, 0.0]]))
        (tensor([1., 1., 1.]), tensor([[-0.6065, -0.0000]]))
    """

    centres: Tensor
    weights: Tensor
    kernel: RadialKernel

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the values at ``x``, ``(..., d)``, shape ``(...)``; differentiable in ``x``."""
        rows = x.reshape(-1, self.centres.shape[-1])
        return (self.kernel(rows, self.centres) @ self.weights).reshape(x.shape[:-1])

    def gradient(self, x: Tensor) -> Tensor:
        """Returns the gradient at ``x`` in closed form, of the shape of ``x``."""
        rows = x.reshape(-1, self.centres.shape[-1])
        pull = self.kernel.slope(squared_distances(rows, self.centres)) * self.weights
        return (rows * pull.sum(-1, keepdim=True) - pull @ self.centres).reshape(x.shape)

    def squared_norm(self) -> Tensor:
        """Returns the squared norm in the kernel's space, 0-d."""
        return self.weights @ self.kernel(self.centres, self.centres) @ self.weights


def mean_difference(p: Tensor, q: Tensor, kernel: RadialKernel) -> KernelFunction:
    r"""Returns :math:`\mu_P - \mu_Q`, the function of largest difference in mean up to its norm.

    Args:
        p: Draws of P, ``(m, d)``.
        q: Draws of Q, ``(n, d)``.
        kernel: The kernel.

    Example:
        >>> f = mean_difference(torch.zeros(4, 1), torch.ones(2, 1), GaussianKernel(1.0))
        >>> f(torch.tensor([[0.0], [0.5]]))
        tensor([0.3935, 0.0000])
    """
    weights = [p.new_full((len(p),), 1.0 / len(p)), q.new_full((len(q),), -1.0 / len(q))]
    return KernelFunction(torch.cat([p, q]), torch.cat(weights), kernel)
