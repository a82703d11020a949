r"""Hamiltonian dynamics shared by HMC, MALA, ChEES and NUTS.

:math:`H(q, p) = U(q) + \tfrac12 p^\top M^{-1} p` with a diagonal :math:`M^{-1}`; leapfrog steps

.. math:: p \leftarrow p - \tfrac\epsilon2 \nabla U(q), \quad q \leftarrow q + \epsilon M^{-1} p,
          \quad p \leftarrow p - \tfrac\epsilon2 \nabla U(q)

preserve volume and are reversible. L of them cost exactly L gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.checks import positive, probability
from pyro_ebm.mcmc.kernel import MAX_ENERGY_ERROR, Info, Kernel, State
from pyro_ebm.mcmc.metropolis import accept


class LeapfrogKernel(Kernel):
    """Base of the kernels that move by leapfrog steps, with the options that they share.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        step_size: The first leapfrog step; found by doubling if not given.
        target_accept_prob: What the step size is adapted to; :attr:`best_accept_prob` by default.
        adapt_step_size: Whether warm-up tunes the step size.
        adapt_mass_matrix: Whether warm-up tunes the diagonal of the inverse mass.
        **options: Those of :class:`Kernel`: ``potential_fn``, ``inverse_temperature``.
    """

    best_accept_prob = 0.8

    def __init__(
        self,
        target: Any = None,
        *,
        step_size: float | None = None,
        target_accept_prob: float | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        wanted = self.best_accept_prob if target_accept_prob is None else target_accept_prob
        self.step_size = None if step_size is None else positive("step_size", step_size)
        self.target_accept_prob = probability("target_accept_prob", wanted)
        self.adapt_step_size = adapt_step_size
        self.adapt_mass_matrix = adapt_mass_matrix

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns the given or a unit step size, and a unit mass."""
        return {
            "step_size": q.new_tensor(self.step_size or 1.0),
            "inverse_mass": q.new_ones(q.shape[1]),
        }


def draw_momentum(state: State) -> Tensor:
    """Draws momenta from N(0, M), ``(C, D)``."""
    return torch.randn_like(state.position) * state.tuning["inverse_mass"].rsqrt()


def kinetic_energy(p: Tensor, inverse_mass: Tensor) -> Tensor:
    """Returns K in nats, ``(C,)``."""
    return 0.5 * torch.mv(p.square(), inverse_mass)


def leapfrog(
    potential: CapturedPotential, state: State, p: Tensor, step_size: Tensor, num_steps: int
) -> tuple[State, Tensor]:
    """Returns the end of a trajectory, position and momentum.

    Args:
        potential: U and its gradient.
        state: Its beginning.
        p: Momenta, ``(C, D)``.
        step_size: 0-d, or ``(C, 1)``; negative goes back in time.
        num_steps: L.
    """
    drift, kick, half_kick = step_size * state.tuning["inverse_mass"], -step_size, -0.5 * step_size
    q, u, gradient = state.position, state.potential, state.gradient
    p = torch.addcmul(p, half_kick, gradient)
    for i in range(num_steps):
        q = torch.addcmul(q, drift, p)
        u, gradient = potential(q)
        p = torch.addcmul(p, kick if i < num_steps - 1 else half_kick, gradient)
    return replace(state, position=q, potential=u, gradient=gradient), p


def energy_error(state: State, end: State, p_start: Tensor, p_end: Tensor) -> Tensor:
    """Returns H at the end less H at the start in nats, ``(C,)``; infinite where it is NaN."""
    inverse_mass = state.tuning["inverse_mass"]
    kinetic = kinetic_energy(p_end, inverse_mass) - kinetic_energy(p_start, inverse_mass)
    error = end.potential - state.potential + kinetic
    return torch.where(error.isnan(), torch.inf, error)


def metropolis(
    state: State, end: State, p_start: Tensor, p_end: Tensor, num_steps: int
) -> tuple[State, Info]:
    """Accepts or rejects the end of a trajectory, chain by chain."""
    error = energy_error(state, end, p_start, p_end)
    moved, accept_prob = accept(state, end, -error)
    info = {
        "acceptance_rate": accept_prob,
        "diverging": error > MAX_ENERGY_ERROR,
        "energy": state.potential + kinetic_energy(p_start, state.tuning["inverse_mass"]),
        "energy_error": error,
        "n_steps": torch.full_like(error, num_steps, dtype=torch.long),
    }
    return moved, info
