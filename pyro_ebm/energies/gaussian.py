r"""The Gaussian energy, the test case of everything: all that can be asked of it is known.

.. math::
    E(x) = \tfrac12 r^\top P r, \quad r = (x - \mu) / \sigma, \qquad
    \log Z = \tfrac d2 \log 2\pi + \sum_i \log \sigma_i - \tfrac12 \log \det P
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.energies.closed_form import ClosedFormEnergy, sum_event


class GaussianEnergy(ClosedFormEnergy):
    r"""Gaussian whose precision is ``precision_matrix`` divided by the scales on both sides.

    Args:
        loc: Mean, ``batch + event``.
        scale: Standard deviations :math:`\sigma > 0`, broadcastable with ``loc``.
        precision_matrix: Positive definite ``batch + (d, d)``, the identity if not given. Implies
            ``event_dim=1``.
        event_dim: How many rightmost dims of ``loc`` and ``scale`` make one event. By default 0, as
            in ``torch.distributions.Normal``: a ``loc`` of shape ``(3,)`` is then three scalar
            events.

    Raises:
        ValueError: If a number given as ``scale`` is not positive, or the arguments do not fix an
            event shape.

    Example:
        >>> energy = GaussianEnergy(torch.zeros(2), 2.0, event_dim=1)
        >>> energy(torch.tensor([[2.0, 0.0], [2.0, 4.0]]))
        tensor([0.5000, 2.5000])
        >>> round(energy.log_normalizer().exp().item(), 4)  # 2 pi 2^2
        25.1327
    """

    loc: Tensor
    scale: Tensor
    precision_matrix: Tensor | None

    def __init__(
        self,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        *,
        precision_matrix: Tensor | None = None,
        event_dim: int | None = None,
    ) -> None:
        shapes = [torch.as_tensor(arg).shape for arg in (loc, scale)]
        if precision_matrix is not None:
            event_dim = _vector_event(precision_matrix, event_dim)
            shapes.append(precision_matrix.shape[:-1])
        event_dim = event_dim or 0
        shape = torch.broadcast_shapes(*shapes)
        if not 0 <= event_dim <= len(shape):
            raise ValueError(
                f"event_dim={event_dim} needs loc or scale with as many dims, got shape "
                f"{tuple(shape)}; give loc=torch.zeros(d)"
            )
        super().__init__(shape[len(shape) - event_dim :])
        self._set("loc", loc)
        self._set("scale", scale, positive=True)
        if precision_matrix is None:
            self.register_buffer("precision_matrix", None)
        else:
            self._set("precision_matrix", precision_matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Returns half the squared Mahalanobis distance of ``x`` from ``loc``."""
        self._check_event(x)
        r = (x - self._arg("loc", x)) / self._arg("scale", x)
        if self.precision_matrix is None:
            return 0.5 * sum_event(r.square(), len(self.event_shape))
        dtype = torch.promote_types(r.dtype, self.precision_matrix.dtype)
        r = r.to(dtype)
        whitened = (r.unsqueeze(-2) @ self.precision_matrix.to(dtype)).squeeze(-2)
        return 0.5 * (whitened * r).sum(-1)

    def log_normalizer(self) -> Tensor:
        """Returns log Z in nats."""
        log_scale = self.scale.log().broadcast_to(self._like().shape)
        log_z = sum_event(log_scale + 0.5 * math.log(2 * math.pi), len(self.event_shape))
        if self.precision_matrix is None:
            return log_z
        diagonal = torch.linalg.cholesky(self.precision_matrix).diagonal(dim1=-2, dim2=-1)
        return log_z - diagonal.log().sum(-1)

    @torch.no_grad()
    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns exact draws of shape ``shape + batch + event_shape``."""
        like = self._like()
        noise = torch.randn((*shape, *like.shape), dtype=like.dtype, device=like.device)
        if self.precision_matrix is not None:
            upper = torch.linalg.cholesky(self.precision_matrix.to(like.dtype)).mT
            noise = torch.linalg.solve_triangular(upper, noise.unsqueeze(-1), upper=True)
            noise = noise.squeeze(-1)
        return self.loc + self.scale * noise

    def _like(self) -> Tensor:
        """Returns a tensor of the shape, dtype and device that all arguments broadcast to."""
        like = self.loc + self.scale
        return like if self.precision_matrix is None else like + self.precision_matrix[..., 0]


def _vector_event(precision_matrix: Tensor, event_dim: int | None) -> int:
    shape = precision_matrix.shape
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"precision_matrix must be (..., d, d), got shape {tuple(shape)}")
    if event_dim not in (None, 1):
        raise ValueError(f"precision_matrix makes events of one dim, got event_dim={event_dim}")
    return 1
