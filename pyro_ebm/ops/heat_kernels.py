r"""Heat kernels :math:`q_t = e^{tR}` on graphs whose nodes are the S values of a discrete variable.

R is a matrix of rates (rows sum to zero), so that row i of :math:`q_t` is the law at time t of a
walk that started at value i:

- *uniform*: any value can become any other, :math:`R = 11^\top / S - I` and
  :math:`q_t = e^{-t} I + (1 - e^{-t})\, 11^\top / S`;
- *cyclic*: values on a ring, a step to either side at rate 1; :math:`q_t` is a circulant with
  eigenvalues :math:`e^{t \lambda_k}`, :math:`\lambda_k = 2 (\cos(2 \pi k / S) - 1)`;
- *ordinal*: values on a path with reflecting ends; the basis is that of the discrete cosine
  transform, :math:`\lambda_k = 2 (\cos(\pi k / S) - 1)`;
- *absorbing*: every value turns at rate 1 into a mask, one more value, which stays.

All but the last are symmetric. As :math:`t \to 0` they are the identity, as :math:`t \to \infty`
uniform (the mask). A walk on the ring or the path has variance 2 t until it feels its size: the
time that is long grows as :math:`S^2`.

References:
    Schröder, Ou, Li and Duncan, Energy-based modelling for discrete and mixed data via heat
    equations on structured spaces, NeurIPS 2024, arXiv:2412.01019; Kondor and Lafferty, Diffusion
    kernels on graphs and other discrete input spaces, ICML 2002.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Structure", "heat_kernel", "rates"]

Structure = Literal["uniform", "cyclic", "ordinal", "absorbing"]


def rates(structure: Structure, num_values: int) -> Tensor:
    """Returns R, ``(S, S)``, or ``(S + 1, S + 1)`` with the mask as the last value.

    Args:
        structure: The graph.
        num_values: S, at least 2.

    Raises:
        ValueError: If the structure is not known or S is below 2.

    Example:
        >>> rates("ordinal", 3)
        tensor([[-1.,  1.,  0.],
                [ 1., -2.,  1.],
                [ 0.,  1., -1.]])
    """
    _check(structure, num_values)
    eye = torch.eye(num_values)
    if structure == "uniform":
        return 1.0 / num_values - eye
    if structure == "absorbing":
        lost = torch.cat([-eye, torch.ones(num_values, 1)], 1)
        return torch.cat([lost, torch.zeros(1, num_values + 1)])
    if structure == "cyclic":
        return eye.roll(1, 1) + eye.roll(-1, 1) - 2 * eye
    beside = torch.diag(torch.ones(num_values - 1), 1)
    beside = beside + beside.T
    return beside - torch.diag(beside.sum(1))


def heat_kernel(structure: Structure, num_values: int, time: Tensor) -> Tensor:
    r"""Returns :math:`e^{tR}` in closed form.

    Args:
        structure: The graph.
        num_values: S, at least 2.
        time: t, not negative, any shape.

    Returns:
        Shape ``time.shape + (S, S)``, rows sum to one; ``(S + 1, S + 1)`` with a mask.

    Raises:
        ValueError: If the structure is not known or S is below 2.

    Example:
        >>> heat_kernel("uniform", 2, torch.tensor(0.5)).sum(-1)
        tensor([1., 1.])
    """
    _check(structure, num_values)
    return _KERNELS[structure](num_values, time[..., None, None])


def _check(structure: Structure, num_values: int) -> None:
    if structure not in _KERNELS:
        raise ValueError(f"structure must be one of {sorted(_KERNELS)}, got {structure!r}")
    if num_values < 2:
        raise ValueError(f"num_values must be at least 2 for a graph, got {num_values}")


def _uniform(num_values: int, time: Tensor) -> Tensor:
    eye = torch.eye(num_values, dtype=time.dtype, device=time.device)
    return torch.exp(-time) * eye - torch.expm1(-time) / num_values


def _absorbing(num_values: int, time: Tensor) -> Tensor:
    eye = torch.eye(num_values + 1, dtype=time.dtype, device=time.device)
    return torch.exp(-time) * eye - torch.expm1(-time) * eye[-1]


def _cyclic(num_values: int, time: Tensor) -> Tensor:
    k = torch.arange(num_values, dtype=time.dtype, device=time.device)
    decay = torch.exp(time[..., 0] * _eigenvalues(2 * k / num_values))
    first = torch.fft.ifft(decay).real
    place = torch.arange(num_values, device=time.device)
    return first[..., (place - place[:, None]) % num_values]


def _ordinal(num_values: int, time: Tensor) -> Tensor:
    k = torch.arange(num_values, dtype=time.dtype, device=time.device)
    basis = torch.cos(math.pi * k[:, None] * (k + 0.5) / num_values)  # DCT-II, one row a k
    basis = basis / basis.norm(dim=1, keepdim=True)
    decay = torch.exp(time * _eigenvalues(k / num_values)[:, None])
    return basis.T @ (decay * basis)


def _eigenvalues(half_turns: Tensor) -> Tensor:
    """2 (cos(pi a) - 1), without the cancellation at small a."""
    return -4.0 * torch.sin(0.5 * math.pi * half_turns).square()


_KERNELS = {
    "uniform": _uniform,
    "cyclic": _cyclic,
    "ordinal": _ordinal,
    "absorbing": _absorbing,
}
