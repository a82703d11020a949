r"""The unadjusted Langevin algorithm: a gradient step and noise, never rejected.

.. math:: q' = q - \tfrac{\epsilon^2}{2} \nabla U(q) + \epsilon\, \xi, \qquad \xi \sim N(0, I)

It does not keep its target: on :math:`U = q^2 / 2\sigma^2` its stationary variance is
:math:`\sigma^2 / (1 - \epsilon^2 / 4\sigma^2)`. Use it for short-run training and first looks, and
a Metropolis kernel for answers.

References:
    Roberts, Tweedie, Exponential convergence of Langevin distributions and their discrete
    approximations, Bernoulli 2, 1996.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import Info, State, ran_off
from pyro_ebm.mcmc.kernels.pyro_kernel import PyroKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import positive


class ULA(PyroKernel):
    r"""Unadjusted Langevin; its chains are marked ``adjusted=False``.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        step_size: :math:`\epsilon`; the drift is :math:`\epsilon^2/2`, as for MALA and HMC.
        **options: Those of :class:`Kernel`: ``potential_fn``, ``inverse_temperature``.

    Example:
        >>> ULA(lambda: None, step_size=0.1).adjusted
        False
    """

    adjusted = False
    evaluates_last = True  # a step ends with its one evaluation, for the next step's use

    def __init__(self, target: Any = None, *, step_size: float = 0.1, **options: Any) -> None:
        super().__init__(target, **options)
        self.step_size = positive("step_size", step_size)

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns the step size, which is not adapted: there is nothing to adapt it to."""
        return {"step_size": q.new_tensor(self.step_size)}

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain."""
        step_size = state.tuning["step_size"]
        q = state.position - 0.5 * step_size.square() * state.gradient
        q = q + step_size * torch.randn_like(q)
        u, gradient = potential(q)
        moved = replace(state, position=q, potential=u, gradient=gradient)
        return moved, {"diverging": ran_off(moved)}
