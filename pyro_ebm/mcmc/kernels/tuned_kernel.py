"""What kernels share whose step size and metric a warm-up tunes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ebm.mcmc.kernels.metric import METRICS
from pyro_ebm.mcmc.kernels.pyro_kernel import PyroKernel
from pyro_ebm.ops.arguments import one_of, positive, probability


class TunedKernel(PyroKernel):
    """Base of kernels that are tuned by a warm-up, with the options that they share.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        step_size: The first step size; :attr:`first_step_size` by default.
        target_accept_prob: What the step size is adapted to; :attr:`best_accept_prob` by default.
        adapt_step_size: Whether warm-up tunes the step size.
        adapt_mass_matrix: Whether warm-up tunes the metric.
        metric: ``"diagonal"``, ``"fisher"`` or ``"dense"`` (:mod:`pyro_ebm.mcmc.kernels.metric`);
            ``"auto"`` is dense with at least as many chains as coordinates, up to 256 of them. A
            kernel without gradients has no ``"fisher"``.
        **options: Those of :class:`Kernel`: ``potential_fn``, ``inverse_temperature``.

    Raises:
        ValueError: If an option is out of range.
    """

    best_accept_prob: float
    first_step_size: float | None = None  # None: one that is searched for, from 1

    def __init__(
        self,
        target: Any = None,
        *,
        step_size: float | None = None,
        target_accept_prob: float | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        metric: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        first = self.first_step_size if step_size is None else step_size
        wanted = self.best_accept_prob if target_accept_prob is None else target_accept_prob
        self.step_size = None if first is None else positive("step_size", first)
        self.target_accept_prob = probability("target_accept_prob", wanted)
        self.adapt_step_size = adapt_step_size
        self.adapt_mass_matrix = adapt_mass_matrix
        known = [m for m in METRICS if m != "fisher" or self.needs_gradient]
        self.metric = one_of("metric", metric, known)

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns the first step size and a unit metric."""
        return {
            "step_size": q.new_tensor(self.step_size or 1.0),
            "root": q.new_ones(q.shape[1]),
        }
