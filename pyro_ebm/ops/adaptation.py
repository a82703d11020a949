r"""What a short chain learns while it warms up: its step size and the scale of each coordinate.

Both pool over chains, the leading dim, and keep every other dim apart, because the elements of a
batch may be problems of very different scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DualAveraging", "PooledCovariance", "PooledVariance"]


class DualAveraging:
    r"""Finds the step size at which a kernel accepts with a wanted probability.

    With the gap :math:`g_t = \delta - \alpha_t` between wanted and seen acceptance,

    .. math::
        \bar g_t = (1 - \tfrac{1}{t + t_0}) \bar g_{t-1} + \tfrac{1}{t + t_0} g_t, \qquad
        \log \epsilon_t = \mu - \tfrac{\sqrt t}{\gamma} \bar g_t,

    and :math:`\log \bar\epsilon_t` averages the iterates with weights :math:`t^{-\kappa}`. Here
    :math:`t_0 = 10, \kappa = .75`, and :math:`\gamma = .15` where .05 is usual: acceptance pooled
    over chains is nearly free of noise, and the stronger response would overshoot and swing.

    Args:
        step_size: The first guess :math:`e^\mu`, also the value that later steps shrink towards.
        target: The wanted acceptance probability :math:`\delta`.
        largest: Bound for kernels whose acceptance stays high however far they go.

    References:
        Hoffman, Gelman, The No-U-Turn Sampler, JMLR 15, 2014, section 3.2.

    Example:
        >>> import torch
        >>> tuner = DualAveraging(torch.ones(1), target=0.574)
        >>> tuner.update(torch.zeros(1))  # everything was rejected
        >>> bool(tuner.step_size < 1)
        True
    """

    gamma, offset, decay = 0.15, 10.0, 0.75

    def __init__(self, step_size: Tensor, *, target: float, largest: float = torch.inf) -> None:
        self.target, self.largest = target, largest
        self._center = self._log_step = self._log_average = step_size.log()
        self._gap = torch.zeros_like(self._center)
        self._count = 0

    @property
    def step_size(self) -> Tensor:
        """The step size to take next."""
        return self._log_step.exp().clamp(max=self.largest)

    def update(self, accept_prob: Tensor) -> None:
        """Takes one step's acceptance probability, shaped as the step size."""
        self._count += 1
        weight = 1.0 / (self._count + self.offset)
        self._gap = (1 - weight) * self._gap + weight * (self.target - accept_prob)
        self._log_step = self._center - self._count**0.5 / self.gamma * self._gap
        share = self._count**-self.decay
        self._log_average = share * self._log_step + (1 - share) * self._log_average

    def freeze(self) -> None:
        """Ends adaptation: from now on the step size is the average of those tried."""
        self._log_step = self._log_average


class PooledVariance:
    """The variance of each coordinate over all chains and steps seen, in one pass.

    Example:
        >>> import torch
        >>> pooled = PooledVariance()
        >>> x = torch.arange(6.0).view(6, 1)
        >>> pooled.update(x[:2])
        >>> pooled.update(x[2:])
        >>> bool(torch.isclose(pooled.variance, x.var(0)).all())
        True
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.zeros(())
        self._spread = torch.zeros(())

    @property
    def count(self) -> int:
        """How many values of each coordinate were seen."""
        return self._count

    def update(self, x: Tensor) -> None:
        """Adds the rows of ``x``, shape ``(chains, ...)``."""
        mean = x.mean(0, keepdim=True)
        spread = (x - mean).square().sum(0, keepdim=True)
        if self._count == 0:
            self._count, self._mean, self._spread = len(x), mean, spread
            return
        total = self._count + len(x)
        shift = mean - self._mean
        self._spread = self._spread + spread + shift.square() * (self._count * len(x) / total)
        self._mean = self._mean + shift * (len(x) / total)
        self._count = total

    @property
    def variance(self) -> Tensor:
        """The variance, shape ``(1, ...)``; one where nothing has moved and no scale is known."""
        variance = self._spread / max(self._count - 1, 1)
        return torch.where(variance.isfinite() & (variance > 0), variance, 1.0)


class PooledCovariance:
    """The covariance of the coordinates over all chains and steps seen, in float64.

    Example:
        >>> import torch
        >>> pooled = PooledCovariance()
        >>> x = torch.arange(12.0, dtype=torch.float64).view(6, 2).square()
        >>> pooled.update(x[:2])
        >>> pooled.update(x[2:])
        >>> bool(torch.allclose(pooled.covariance, torch.cov(x.T)))
        True
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._spread = torch.zeros((), dtype=torch.float64)

    @property
    def count(self) -> int:
        """How many rows were seen."""
        return self._count

    def update(self, x: Tensor) -> None:
        """Adds the rows of ``x``, shape ``(chains, D)``."""
        x = x.double()
        mean = x.mean(0)
        total = self._count + len(x)
        shift = mean - self._mean
        self._spread = self._spread + (x - mean).T @ (x - mean)
        self._spread = self._spread + shift[:, None] * shift * (self._count * len(x) / total)
        self._mean = self._mean + shift * (len(x) / total)
        self._count = total

    @property
    def covariance(self) -> Tensor:
        """The covariance, shape ``(D, D)``."""
        return self._spread / max(self._count - 1, 1)
