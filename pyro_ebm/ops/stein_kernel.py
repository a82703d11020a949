r"""The Stein kernel of a radial kernel: how far points are from a law, by its score alone.

With a kernel k and a score :math:`s = \nabla\log p`,

.. math::
    k_p(x, y) = s(x) \cdot s(y)\, k + s(x) \cdot \nabla_y k + s(y) \cdot \nabla_x k
        + \operatorname{tr} \nabla_x \nabla_y^\top k ,

whose mean over :math:`x \sim p` is zero for every y. It is linear in each of the two scores: where
they carry independent errors of mean zero, so does the kernel of two different points. With the
inverse multiquadric it detects mass that runs away.

References:
    Gorham, Mackey, Measuring sample quality with kernels, ICML 2017, arXiv:1703.01717.
"""

from __future__ import annotations

from torch import Tensor

from pyro_ebm.ops.kernels import InverseMultiquadricKernel, RadialKernel, squared_distances

__all__ = ["imq_stein_kernel", "stein_kernel"]


def stein_kernel(x: Tensor, score: Tensor, kernel: RadialKernel) -> Tensor:
    r"""Returns :math:`k_p(x_i, x_j)` of all pairs, ``(n, n)``, without an ``(n, n, d)`` array.

    Args:
        x: Points, ``(n, d)``.
        score: The gradient of the log density there, ``(n, d)``.
        kernel: The kernel k.

    Example:
        >>> import torch
        >>> stein_kernel(torch.ones(1, 2), torch.zeros(1, 2), InverseMultiquadricKernel(1.0))
        tensor([[2.]])
    """
    squared = squared_distances(x, x)
    x = x - x.detach().mean(0)  # only differences enter; far from the origin they lose digits
    along = (score * x).sum(-1)
    cross = score @ x.mT  # s(x_i) . x_j
    slopes = along[:, None] + along - cross - cross.mT  # (s(x) - s(y)) . (x - y)
    products = score @ score.mT * kernel.value(squared)
    return products - slopes * kernel.slope(squared) + kernel.trace(squared, x.shape[-1])


def imq_stein_kernel(x: Tensor, score: Tensor) -> Tensor:
    r"""Returns the Stein kernel of :math:`(1 + \lVert x - y \rVert^2)^{-1/2}`, ``(n, n)``.

    Args:
        x: Points, ``(n, d)``, in coordinates where their spread is about 1.
        score: The gradient of the log density there, ``(n, d)``.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> imq_stein_kernel(x, -x)
        tensor([[ 1.0000, -0.5303],
                [-0.5303,  2.0000]])
    """
    return stein_kernel(x, score, InverseMultiquadricKernel(1.0))
