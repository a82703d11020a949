r"""Particle flows: a cloud of points carried to a target sample down the gradient of a divergence.

With the moving points as P and the target sample as Q, every particle takes steps

.. math:: y \leftarrow y - \gamma\, v(y + \beta u), \qquad u \sim N(0, I),

where v is the gradient of the divergence's first variation: for the *KALE flow*
:math:`v = (1 + \lambda) \nabla h^*`, h* the witness of :math:`\mathrm{KALE}_\lambda(P \| Q)`; for
the *MMD flow* :math:`v = \nabla (\mu_P - \mu_Q)`, the gradient of
:math:`\tfrac12 \mathrm{MMD}^2`. With :math:`\beta > 0` (noise injection) the gradient is taken at a
perturbed point, while the particle itself is not perturbed: it helps particles that sit where the
kernel's gradient vanishes, and is to be lowered to zero.

As :math:`\lambda \to \infty` the KALE flow is the MMD flow, as :math:`\lambda \to 0` the
Kullback-Leibler flow, that is Langevin diffusion. P = Q is a fixed point of both. These are finite
transports, not Markov chains: there is no invariant law to have an R-hat of.

References:
    Arbel, Korba, Salim, Gretton, Maximum mean discrepancy gradient flow, NeurIPS 2019,
    arXiv:1906.04370;
    Glaser, Arbel, Gretton, KALE flow: a relaxed KL gradient flow for probabilities with disjoint
    support, NeurIPS 2021, arXiv:2106.08929.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.ops.arguments import positive
from pyro_ebm.ops.kale_dual import DualProblem, check_samples, solve_dual, witness
from pyro_ebm.ops.kernels import KernelFunction, RadialKernel, mean_difference

Noise = float | Callable[[int], float]


class ParticleFlow(NamedTuple):
    """What a flow did.

    Args:
        trajectory: Particles at the snapshots, ``(S, n, *event)``; the last ones are the result.
        steps: After how many steps each snapshot was taken, ``(S,)``.
        values: The divergence before each step, ``(num_steps,)``, in nats for the KALE flow; half
            the squared MMD (biased, diagonals kept) for the MMD flow.
        gaps: The duality gap at each step, ``(num_steps,)``, in nats; zeros for the MMD flow.
    """

    trajectory: Tensor
    steps: Tensor
    values: Tensor
    gaps: Tensor

    @property
    def particles(self) -> Tensor:
        """The particles of the last snapshot, ``(n, *event)``."""
        return self.trajectory[-1]


class _Field(NamedTuple):
    """The witness that carries the particles, with the divergence it belongs to."""

    witness: KernelFunction
    factor: float
    value: Tensor
    gap: Tensor


def kale_flow(
    particles: Tensor,
    target: Tensor,
    kernel: RadialKernel,
    regularization: float,
    *,
    step_size: float,
    num_steps: int,
    noise: Noise = 0.0,
    snapshots: int | Sequence[int] = 2,
    tolerance: float = 1e-6,
    disable_progbar: bool = True,
) -> ParticleFlow:
    r"""Moves particles to a target sample down :math:`\mathrm{KALE}_\lambda`.

    The dual of every step starts from the weights of the step before. A step costs a few Cholesky
    factors of the target's size.

    Args:
        particles: The start, ``(m, *event)``.
        target: Draws of the target, ``(n, *event)``.
        kernel: The kernel of the witness's space.
        regularization: :math:`\lambda > 0`.
        step_size: :math:`\gamma`.
        num_steps: Number of steps.
        noise: :math:`\beta` in units of x, or a function of the step that returns it.
        snapshots: How many evenly spaced snapshots, first and last included, or the steps after
            which to take them.
        tolerance: The largest duality gap of a step, in nats and relative to 1 + the value.
        disable_progbar: Hides the progress bar.

    Raises:
        ValueError: If a number is not positive, a snapshot is not one of the steps, or the samples
            are empty, not finite or of different event shapes.
        TypeError: If a sample is not of a floating dtype.
        RuntimeError: If the dual of a step could not be solved, or particles are not finite.

    Example:
        >>> from pyro_ebm.ops.kernels import GaussianKernel
        >>> _ = torch.manual_seed(0)
        >>> start, target = torch.randn(30, 1), torch.randn(30, 1) + 2
        >>> flow = kale_flow(start, target, GaussianKernel(1.0), 0.1, step_size=0.2, num_steps=60)
        >>> bool(flow.values[-1] < 0.05 * flow.values[0])
        True
    """
    rows = _target(particles, target)
    gram = kernel(rows, rows)
    lam = positive("regularization", regularization)
    log_weights: Tensor | None = None

    def field(y: Tensor) -> _Field:
        nonlocal log_weights
        problem = DualProblem(gram, kernel(rows, y).mean(1), kernel(y, y).mean(), lam)
        solved = solve_dual(problem, log_weights, tolerance=tolerance)
        log_weights = solved.log_weights
        alpha = log_weights.exp() / len(rows)
        h = witness(y, rows, alpha, kernel, lam)
        return _Field(h, 1.0 + lam, solved.value, solved.gap)

    schedule = _Schedule(step_size, num_steps, noise, snapshots)
    return _flow(particles, field, schedule, disable_progbar=disable_progbar)


def mmd_flow(
    particles: Tensor,
    target: Tensor,
    kernel: RadialKernel,
    *,
    step_size: float,
    num_steps: int,
    noise: Noise = 0.0,
    snapshots: int | Sequence[int] = 2,
    disable_progbar: bool = True,
) -> ParticleFlow:
    r"""Moves particles to a target sample down :math:`\tfrac12 \mathrm{MMD}^2`.

    Args:
        particles: As for :func:`kale_flow`.
        target: As for :func:`kale_flow`.
        kernel: The kernel.
        step_size: :math:`\gamma`.
        num_steps: Number of steps.
        noise: As for :func:`kale_flow`.
        snapshots: As for :func:`kale_flow`.
        disable_progbar: Hides the progress bar.

    Raises:
        ValueError: As :func:`kale_flow`.
        TypeError: If a sample is not of a floating dtype.
        RuntimeError: If particles are not finite.

    Example:
        >>> from pyro_ebm.ops.kernels import GaussianKernel
        >>> _ = torch.manual_seed(0)
        >>> start, target = torch.randn(30, 1), torch.randn(30, 1) + 2
        >>> flow = mmd_flow(start, target, GaussianKernel(1.0), step_size=0.5, num_steps=100)
        >>> bool(flow.values[-1] < 0.1 * flow.values[0])
        True
    """
    rows = _target(particles, target)
    constant = kernel(rows, rows).mean()

    def field(y: Tensor) -> _Field:
        f = mean_difference(y, rows, kernel)
        value = 0.5 * (kernel(y, y).mean() + constant) - kernel(y, rows).mean()
        return _Field(f, 1.0, value, value.new_zeros(()))

    schedule = _Schedule(step_size, num_steps, noise, snapshots)
    return _flow(particles, field, schedule, disable_progbar=disable_progbar)


class _Schedule:
    """Step size, noise and snapshots of a flow, checked."""

    def __init__(
        self, step_size: float, num_steps: int, noise: Noise, snapshots: int | Sequence[int]
    ) -> None:
        self.step_size = positive("step_size", step_size)
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps!r}")
        self.num_steps = num_steps
        self.noise = noise
        self.snapshots = _steps_of(snapshots, num_steps)

    def noise_at(self, step: int) -> float:
        """Returns the standard deviation of the perturbation at a step."""
        value = self.noise(step) if callable(self.noise) else self.noise
        if not value >= 0:
            raise ValueError(f"noise must not be negative, got {value!r} at step {step}")
        return value


def _steps_of(snapshots: int | Sequence[int], num_steps: int) -> list[int]:
    if isinstance(snapshots, int):
        if snapshots < 2:
            raise ValueError(f"snapshots must be at least 2, first and last, got {snapshots}")
        snapshots = [round(num_steps * k / (snapshots - 1)) for k in range(snapshots)]
    steps = sorted(set(snapshots))
    if not steps or steps[0] < 0 or steps[-1] > num_steps:
        raise ValueError(f"snapshots must be steps between 0 and {num_steps}, got {snapshots}")
    return steps


def _target(particles: Tensor, target: Tensor) -> Tensor:
    """The target's rows, after a check of both samples."""
    check_samples({"particles": particles, "target": target})
    return target.detach().reshape(len(target), -1).double()


@torch.no_grad()
def _flow(
    particles: Tensor,
    field: Callable[[Tensor], _Field],
    schedule: _Schedule,
    *,
    disable_progbar: bool,
) -> ParticleFlow:
    y = particles.reshape(len(particles), -1).double()
    kept, values, gaps = {0: y}, [], []
    with tqdm(range(schedule.num_steps), desc="flow", disable=disable_progbar) as bar:
        for step in bar:
            found = field(y)
            at = y + schedule.noise_at(step) * torch.randn_like(y)
            y = y - schedule.step_size * found.factor * found.witness.gradient(at)
            _check_finite(y, step)
            values.append(found.value)
            gaps.append(found.gap)
            if step % 10 == 0:
                bar.set_postfix_str(f"divergence {float(found.value):.3g}", refresh=False)
            if step + 1 in schedule.snapshots:
                kept[step + 1] = y
    chosen = torch.stack([kept[s] for s in schedule.snapshots]).to(particles.dtype)
    return ParticleFlow(
        chosen.reshape((-1, *particles.shape)),
        torch.tensor(schedule.snapshots),
        torch.stack(values).to(particles.dtype),
        torch.stack(gaps).to(particles.dtype),
    )


def _check_finite(y: Tensor, step: int) -> None:
    if not y.isfinite().all():
        raise RuntimeError(
            f"the particles are not finite after step {step}: lower step_size, or raise the "
            "kernel's length scale or regularization"
        )
