r"""Noise for directions: the uniform law on a unit sphere.

.. math:: \log q(x) = -\log\frac{2\pi^{n/2}}{\Gamma(n/2)}, \qquad x \in S^{n-1} \subset \mathbb R^n

With respect to the surface measure. Pyro's projected normal without a direction draws from it, and
has its density for n up to 4 only.
"""

from __future__ import annotations

import math

from pyro.distributions import ProjectedNormal
from torch import Size, Tensor
from torch.distributions import Distribution, Independent


class UniformOnSphere(ProjectedNormal):
    """The uniform law on a unit sphere.

    Args:
        concentration: Zeros, ``batch + (n,)``.

    Example:
        >>> import torch
        >>> law = UniformOnSphere(torch.zeros(3))
        >>> law.log_prob(law.sample())  # minus log(4 pi)
        tensor(-2.5310)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns minus the log of the area in nats, at ``value``, ``rows + (n,)``, of ``rows``."""
        half = 0.5 * self.event_shape[-1]
        log_area = math.log(2.0) + half * math.log(math.pi) - math.lgamma(half)
        return value.new_full(value.shape[:-1], -log_area)


def uniform_directions(like: Tensor, event_shape: Size) -> Distribution:
    """Returns the uniform law of events whose last dim is a unit vector.

    Args:
        like: Its dtype and device are theirs.
        event_shape: The shape of one event.

    Example:
        >>> import torch
        >>> uniform_directions(torch.zeros(()), torch.Size((5, 3))).event_shape
        torch.Size([5, 3])
    """
    law = UniformOnSphere(like.new_zeros(event_shape))
    return Independent(law, len(event_shape) - 1) if len(event_shape) > 1 else law
