r"""The Metropolis-adjusted Langevin kernel (MALA) for continuous supports.

In the unconstrained coordinates :math:`u` with target :math:`U_u`, step size :math:`\epsilon` and a
diagonal preconditioner :math:`V`,

.. math:: u' = u + \epsilon V^{1/2} (d(u) + \xi), \qquad
          d(u) = -\tfrac{\epsilon}{2} V^{1/2} \nabla U_u(u), \qquad
          \log\alpha = U_u(u) - U_u(u') + \log q(u \mid u') - \log q(u' \mid u).

Each element of :math:`d` is truncated to :math:`[-2, 2]` standard deviations of the noise. The
truncated drift enters :math:`q` in both directions, so the target stays exact, and chains that
start where the energy is steep come down in steps instead of overshooting and staying for ever.

The step size is tuned to the acceptance .574 that is optimal in high dimension, and :math:`V`
becomes the variance over chains. One gradient per step.

References:
    Roberts, Tweedie, Exponential convergence of Langevin distributions and their discrete
    approximations, Bernoulli 2(4), 1996 (the truncated algorithm is MALTA).
    Roberts, Rosenthal, Optimal scaling of discrete approximations to Langevin diffusions, JRSS B
    60, 1998.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.ops.adaptation import DualAveraging, PooledVariance
from pyro_ebm.ops.autograd import grad_of
from pyro_ebm.ops.short_kernel import Point, Potential, metropolis
from pyro_ebm.ops.spaces import UnconstrainedSpace

__all__ = ["Langevin", "log_accept", "propose", "proposal_log_prob"]

MAX_DRIFT = 2.0
"""Bound on the drift of a coordinate, in standard deviations of the proposal's noise."""

MIN_CHAINS_FOR_VARIANCE = 16
"""With fewer chains the variance across them is noise, and the preconditioner stays one."""


def _drifted(point: Point, step_size: Tensor, variance: Tensor) -> Tensor:
    if point.gradient is None:
        raise ValueError("a Langevin step needs the gradient at the point it starts from, got None")
    scale = step_size[..., None] * variance.sqrt()
    drift = (-0.5 * scale * point.gradient).clamp(-MAX_DRIFT, MAX_DRIFT)
    return point.position + scale * drift


def propose(point: Point, noise: Tensor, step_size: Tensor, variance: Tensor) -> Tensor:
    """Returns the Langevin proposal from ``point`` with standard normal ``noise``.

    Args:
        point: The current point with its gradient.
        noise: Shape ``(chains, *batch, D)``.
        step_size: The noise scale, shape ``(1, *batch)``.
        variance: Diagonal preconditioner, broadcastable with ``noise``.
    """
    return _drifted(point, step_size, variance) + step_size[..., None] * variance.sqrt() * noise


def proposal_log_prob(point: Point, to: Tensor, step_size: Tensor, variance: Tensor) -> Tensor:
    """Returns the log density of proposing ``to``, up to a constant that no point changes."""
    deviation = to - _drifted(point, step_size, variance)
    squares = (deviation.square() / variance).sum(-1)
    return -0.5 * squares / step_size.square()


def log_accept(old: Point, new: Point, step_size: Tensor, variance: Tensor) -> Tensor:
    """Returns the log Metropolis-Hastings ratio of moving from ``old`` to ``new``."""
    forward = proposal_log_prob(old, new.position, step_size, variance)
    backward = proposal_log_prob(new, old.position, step_size, variance)
    return old.target - new.target + backward - forward


class Langevin:
    """MALA on the unconstrained coordinates of a continuous support.

    Args:
        space: The coordinates.
        num_warmup: How often ``step(..., adapt=True)`` will be called.
        step_size: The first noise scale, shape ``(1, *batch)``, in units of the preconditioner; by
            default 1.65 D^(-1/6), the best one for a standard normal.
        variance: The first preconditioner, shape ``(1, *batch, D)``; by default the variance over
            chains at the first step, or one with fewer than 16 chains.

    Example:
        >>> import torch
        >>> from pyro.distributions import constraints
        >>> _ = torch.manual_seed(0)
        >>> kernel = Langevin(UnconstrainedSpace.of(constraints.positive, torch.Size([])))
        >>> point = kernel.start(lambda x: x, torch.ones(8))  # an exponential distribution
        >>> point, accept_prob = kernel.step(lambda x: x, point)
        >>> kernel.events(point).shape
        torch.Size([8])
    """

    target_accept_prob = 0.574

    def __init__(
        self,
        space: UnconstrainedSpace,
        *,
        num_warmup: int = 0,
        step_size: Tensor | None = None,
        variance: Tensor | None = None,
    ) -> None:
        self.space = space
        self.variance = variance
        self._first_step_size = step_size
        self._tuner: DualAveraging | None = None
        self._window = PooledVariance()
        # The last half of the warm-up is left to the step size alone.
        self._variance_updates = (num_warmup // 5, num_warmup // 2) if num_warmup >= 20 else ()
        self._num_adapted = 0

    def start(self, potential: Potential, x: Tensor) -> Point:
        """Returns the point at ``x``; costs one gradient."""
        return self._evaluate(potential, self.space.to_unconstrained(x))

    def step(
        self, potential: Potential, point: Point, *, adapt: bool = False
    ) -> tuple[Point, Tensor]:
        """Proposes and accepts once per chain; costs one gradient."""
        step_size, variance = self._scales(point)
        noise = torch.randn_like(point.position)
        new = self._evaluate(potential, propose(point, noise, step_size, variance))
        ratio = log_accept(point, new, step_size, variance)
        point, accepted = metropolis(point, new, ratio)
        if adapt:
            self._adapt(point, accepted)
        return point, accepted

    def events(self, point: Point) -> Tensor:
        """Returns the states on the support."""
        return self.space.to_support(point.position)

    def potential(self, point: Point) -> Tensor:
        """Returns the potential on the support, the log-determinant put back."""
        return point.target + self.space.with_log_det(point.position)[1]

    def freeze(self) -> None:
        """Fixes the step size at the average over the last part of the warm-up."""
        if self._tuner is not None:
            self._tuner.freeze()

    def _evaluate(self, potential: Potential, u: Tensor) -> Point:
        def target(v: Tensor) -> Tensor:
            x, log_det = self.space.with_log_det(v)
            return potential(x) - log_det

        return Point(u, *grad_of(target, u))

    def _scales(self, point: Point) -> tuple[Tensor, Tensor]:
        if self.variance is None:
            self.variance = _variance_over_chains(point.position)
        if self._tuner is None:
            self._tuner = self._new_tuner(point)
        return self._tuner.step_size, self.variance

    def _new_tuner(self, point: Point) -> DualAveraging:
        guess = self._first_step_size
        if guess is None:
            guess = torch.full_like(point.target[:1], 1.65 * self.space.size ** (-1 / 6))
        return DualAveraging(guess, target=self.target_accept_prob)

    def _adapt(self, point: Point, accepted: Tensor) -> None:
        self._num_adapted += 1
        if self._tuner is not None:
            self._tuner.update(accepted.mean(0, keepdim=True))
        if len(accepted) >= MIN_CHAINS_FOR_VARIANCE:
            self._window.update(point.position)
            if self._num_adapted in self._variance_updates:
                self.variance, self._window = self._window.variance, PooledVariance()
                self._tuner = self._new_tuner(point)


def _variance_over_chains(u: Tensor) -> Tensor:
    if len(u) < MIN_CHAINS_FOR_VARIANCE:
        return torch.ones_like(u[:1])
    pooled = PooledVariance()
    pooled.update(u)
    return pooled.variance
