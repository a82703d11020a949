r"""The kernel KALE of two samples: a divergence between MMD and Kullback-Leibler, by its dual.

For laws P (the linear slot) and Q (the exponential slot), a kernel's space H and :math:`\lambda>0`,

.. math:: \mathrm{KALE}_\lambda(P \| Q) = (1 + \lambda) \max_{h \in H} \big\{ 1 + E_P h - E_Q e^h
    - \tfrac{\lambda}{2} \lVert h \rVert_H^2 \big\} .

It is at least 0, and 0 only where P = Q (for kernels that tell laws apart); it tends to KL as
:math:`\lambda \to 0` and to :math:`\tfrac12 \mathrm{MMD}^2` as :math:`\lambda \to \infty`, and is
finite for laws on different supports. For samples :math:`p_1..p_m` and :math:`q_1..q_n`, with
:math:`K = k(q_i, q_j)`, :math:`\mu_i = \frac1m \sum_j k(p_j, q_i)` and
:math:`\gamma = \frac1{m^2} \sum_{jj'} k(p_j, p_{j'})`, the dual is

.. math:: 1 + \min_{\alpha \ge 0} \sum_i \big[\alpha_i \log(n \alpha_i) - \alpha_i\big]
    + \frac{1}{2\lambda} (\alpha^\top K \alpha - 2 \mu^\top \alpha + \gamma), \qquad
    h = \frac1\lambda \Big( \frac1m \sum_j k(p_j, \cdot) - \sum_i \alpha_i k(q_i, \cdot) \Big),

and :math:`\alpha_i = e^{h(q_i)} / n` at the optimum. It is solved by Newton's method with steps in
:math:`a = \log(n \alpha)`, so that the weights stay positive. The duality gap of the h of any
weights is a sum of terms that cannot be negative,

.. math:: \sum_i \alpha_i \big(e^{r_i} - 1 - r_i\big), \qquad r_i = h(q_i) - \log(n \alpha_i),

and no bound is handed out that it has not been closed for. Memory is quadratic in n and a step
cubic: a thousand points are comfortable. Everything is computed in double precision.

References:
    Glaser, Arbel, Gretton, KALE flow: a relaxed KL gradient flow for probabilities with disjoint
    support, NeurIPS 2021, arXiv:2106.08929.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.ops.arguments import positive
from pyro_ebm.ops.kernels import KernelFunction, RadialKernel

__all__ = ["DualProblem", "DualSolution", "KernelKALEResult", "kernel_kale", "solve_dual"]

SUFFICIENT = 0.1  # share of the predicted decrease that a step must reach
MIN_STEP = 1e-9
MAX_EXPONENT = 700.0
ROUNDING = 1e-15


class DualProblem(NamedTuple):
    r"""What the dual needs of the two samples, in float64.

    Args:
        gram: The kernel between points of Q, ``(n, n)``.
        mean: :math:`\mu`, the mean kernel between points of P and each of Q, ``(n,)``.
        square: :math:`\gamma`, the mean kernel between points of P, 0-d.
        regularization: :math:`\lambda > 0`.
    """

    gram: Tensor
    mean: Tensor
    square: Tensor
    regularization: float

    def witness(self, log_weights: Tensor) -> Tensor:
        """Returns h at the points of Q, for weights ``exp(log_weights) / n``."""
        return (self.mean - self.gram @ _weights(log_weights)) / self.regularization

    def rounding(self, log_weights: Tensor) -> Tensor:
        """Returns about how far the value is off by its own arithmetic, 0-d."""
        alpha = _weights(log_weights)
        terms = alpha @ (self.gram @ alpha) + 2.0 * self.mean @ alpha + self.square
        return ROUNDING * (1.0 + terms / self.regularization)

    def value(self, log_weights: Tensor) -> Tensor:
        """Returns one plus the dual objective, 0-d; at least the divergence over 1 + lambda."""
        alpha = _weights(log_weights)
        a = log_weights
        entropy = (a * a.exp() - a.expm1()).mean()  # 1 + sum of alpha a - alpha, never negative
        square = alpha @ (self.gram @ alpha) - 2.0 * self.mean @ alpha + self.square
        return entropy + square.clamp_min(0.0) / (2.0 * self.regularization)


class DualSolution(NamedTuple):
    """Weights and how well they solve the dual.

    Args:
        log_weights: ``log(n alpha)``, ``(n,)``.
        value: The divergence in nats, 0-d: (1 + lambda) times the dual value.
        gap: (1 + lambda) times the duality gap in nats, 0-d: the divergence is at most this much
            less.
        num_steps: Newton steps taken.
    """

    log_weights: Tensor
    value: Tensor
    gap: Tensor
    num_steps: int


class KernelKALEResult(NamedTuple):
    r"""The divergence of two samples.

    Args:
        value: :math:`\mathrm{KALE}_\lambda` in nats, 0-d.
        witness: The maximizer h. ``EnergyDistribution(lambda x: -h(x), base=...)`` is the EBM that
            tilts the law of Q towards P.
        alpha: The weights of the points of Q, ``(n,)``, positive and of sum about 1.
        gap: The duality gap in nats, 0-d.
        num_steps: Newton steps taken.
    """

    value: Tensor
    witness: KernelFunction
    alpha: Tensor
    gap: Tensor
    num_steps: int


def kernel_kale(
    p: Tensor,
    q: Tensor,
    kernel: RadialKernel,
    regularization: float,
    *,
    tolerance: float = 1e-12,
    max_steps: int = 200,
) -> KernelKALEResult:
    r"""Returns :math:`\mathrm{KALE}_\lambda(P \| Q)` of two samples and its witness.

    Args:
        p: Draws of P, the linear slot, ``(m, d)`` (or ``(m, *event)``, flattened).
        q: Draws of Q, the exponential slot, ``(n, d)``.
        kernel: The kernel of the witness's space.
        regularization: :math:`\lambda > 0`.
        tolerance: The largest duality gap, in nats and relative to 1 + the value.
        max_steps: The most Newton steps.

    Returns:
        Value, witness, weights and gap, in the dtype of ``p``.

    Raises:
        ValueError: If lambda is not positive, or samples are empty, not finite or of different
            event shapes.
        TypeError: If a sample is not of a floating dtype.
        RuntimeError: If the duality gap was not closed.

    Example:
        >>> from pyro_ebm.ops.kernels import GaussianKernel
        >>> _ = torch.manual_seed(0)
        >>> p, q = torch.randn(100, 2) + 1, torch.randn(100, 2)
        >>> result = kernel_kale(p, q, GaussianKernel(1.0), 1e-2)
        >>> bool(result.value > 0.5), bool(result.gap < 1e-8)
        (True, True)
    """
    check_samples({"p": p, "q": q})
    rows_p, rows_q = (z.detach().reshape(len(z), -1).double() for z in (p, q))
    problem = DualProblem(
        kernel(rows_q, rows_q),
        kernel(rows_q, rows_p).mean(1),
        kernel(rows_p, rows_p).mean(),
        positive("regularization", regularization),
    )
    solved = solve_dual(problem, tolerance=tolerance, max_steps=max_steps)
    alpha = _weights(solved.log_weights)
    h = witness(rows_p, rows_q, alpha, kernel, regularization)
    h = h._replace(centres=h.centres.to(p.dtype), weights=h.weights.to(p.dtype))
    value, gap = solved.value.to(p.dtype), solved.gap.to(p.dtype)
    return KernelKALEResult(value, h, alpha.to(p.dtype), gap, solved.num_steps)


def witness(
    p: Tensor, q: Tensor, alpha: Tensor, kernel: RadialKernel, regularization: float
) -> KernelFunction:
    """Returns h of the weights ``alpha`` of the points of Q."""
    weights = torch.cat([p.new_full((len(p),), 1.0 / len(p)), -alpha]) / regularization
    return KernelFunction(torch.cat([p, q]), weights, kernel)


def solve_dual(
    problem: DualProblem,
    initial: Tensor | None = None,
    *,
    tolerance: float = 1e-12,
    max_steps: int = 200,
) -> DualSolution:
    """Minimizes the dual by damped Newton steps in the log weights.

    Args:
        problem: The dual.
        initial: Log weights to begin at, ``(n,)``, such as those of a problem nearby; zeros, equal
            weights, if not given.
        tolerance: The largest gap, in nats and relative to 1 + the value.
        max_steps: The most steps.

    Raises:
        RuntimeError: If the duality gap was not closed.
    """
    scale = 1.0 + problem.regularization
    a = torch.zeros_like(problem.mean) if initial is None else initial
    for step in range(max_steps + 1):
        residual = problem.witness(a) - a
        gap, value = scale * _gap(a, residual), scale * problem.value(a)
        if gap <= tolerance * (1.0 + value):
            return DualSolution(a, value, gap, step)
        moved = _newton_step(problem, a, residual) if step < max_steps else None
        if moved is None:
            break
        a = moved
    raise RuntimeError(
        f"the dual of the kernel KALE was not solved: a duality gap of {float(gap):.2g} nats is "
        f"left after {step} Newton steps, more than tolerance={tolerance:.2g} times 1 + the value "
        f"({float(value):.3g}). Raise max_steps, regularization (now "
        f"{problem.regularization:.3g}) or the kernel's length scale, or start from the weights of "
        "a larger regularization"
    )


def _newton_step(problem: DualProblem, a: Tensor, residual: Tensor) -> Tensor | None:
    """One damped step; None where no step decreases the dual any further.

    The Hessian in alpha is diag(1/alpha) + K/lambda. With s = sqrt(alpha) its step is, in the log
    weights, (1/s) B^-1 s residual, B = I + s K s / lambda: no eigenvalue of B is below 1.
    """
    alpha = _weights(a)
    s = alpha.sqrt()
    b = problem.gram * (s[:, None] * s) / problem.regularization
    b.diagonal().add_(1.0)
    factor = torch.linalg.cholesky(b)
    # residual - K s B^-1 (s residual) / lambda = (1/s) B^-1 (s residual), without dividing by s
    inner = torch.cholesky_solve((s * residual)[:, None], factor)[:, 0]
    direction = residual - problem.gram @ (s * inner) / problem.regularization
    decrease = (alpha * residual) @ direction
    return _line_search(problem, a, direction, decrease)


def _line_search(
    problem: DualProblem, a: Tensor, direction: Tensor, decrease: Tensor
) -> Tensor | None:
    start, size = problem.value(a), 1.0
    rounding = ROUNDING * start + problem.rounding(a)
    while size > MIN_STEP:
        moved = a + size * direction
        if moved.max() < MAX_EXPONENT:  # beyond, the weights overflow
            value = problem.value(moved)
            # Near the solution the decrease is below the rounding of the two values.
            if value <= start - SUFFICIENT * size * decrease + rounding:
                return moved
        size *= 0.5
    return None


def _gap(a: Tensor, residual: Tensor) -> Tensor:
    return (_weights(a) * (residual.expm1() - residual)).sum()


def _weights(log_weights: Tensor) -> Tensor:
    return log_weights.exp() / len(log_weights)


def check_samples(samples: Mapping[str, Tensor]) -> None:
    """Raises unless samples, by name, are finite, not empty and of one event shape."""
    for name, z in samples.items():
        if z.dim() < 1 or not len(z):
            raise ValueError(f"{name} must hold at least one row, got shape {tuple(z.shape)}")
        if not z.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {z.dtype}")
        if not z.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinite values")
    events = {name: tuple(z.shape[1:]) for name, z in samples.items()}
    if len(set(events.values())) > 1:
        raise ValueError(f"all samples must have one event shape, got {events}")
