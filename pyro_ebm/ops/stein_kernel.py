r"""The Stein kernel of the inverse multiquadric: how far points are from a law, by its score alone.

With :math:`k(x, y) = (1 + \lVert x - y \rVert^2)^{-1/2}` and a score :math:`s = \nabla\log p`,

.. math::
    k_p(x, y) = s(x) \cdot s(y)\, k + s(x) \cdot \nabla_y k + s(y) \cdot \nabla_x k
        + \operatorname{tr} \nabla_x \nabla_y^\top k ,

whose mean over :math:`x \sim p` is zero for every y. It is linear in each of the two scores: where
they carry independent errors of mean zero, so does the kernel of two different points.

References:
    Gorham, Mackey, Measuring sample quality with kernels, ICML 2017, arXiv:1703.01717.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["imq_stein_kernel"]


def imq_stein_kernel(x: Tensor, score: Tensor) -> Tensor:
    r"""Returns :math:`k_p(x_i, x_j)` of all pairs, ``(n, n)``.

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
    dim = x.shape[-1]
    square = x.square().sum(-1)
    r2 = (square[:, None] + square - 2.0 * x @ x.mT).clamp_min(0.0)
    along = (score * x).sum(-1)
    cross = score @ x.mT  # s(x_i) . x_j
    slopes = along[:, None] + along - cross - cross.mT  # (s(x) - s(y)) . (x - y)
    u = 1.0 + r2
    return (score @ score.mT + (slopes + dim - 3.0 * r2 / u) / u) / u.sqrt()
