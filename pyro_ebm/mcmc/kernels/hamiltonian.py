r"""Hamiltonian dynamics shared by HMC, MALA, ChEES and NUTS.

With the whitened momentum p, standard normal, and the metric :math:`M^{-1} = R R^\top`,
:math:`H(q, p) = U(q) + \tfrac12 \|p\|^2`; leapfrog steps

.. math:: p \leftarrow p - \tfrac\epsilon2 R^\top \nabla U(q), \quad q \leftarrow q + \epsilon R p,
          \quad p \leftarrow p - \tfrac\epsilon2 R^\top \nabla U(q)

preserve volume and are reversible. L of them cost exactly L gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import MAX_ENERGY_ERROR, Info, State
from pyro_ebm.mcmc.kernels.metric import pulled_back, stretched
from pyro_ebm.mcmc.kernels.metropolis import accept
from pyro_ebm.mcmc.kernels.tuned_kernel import TunedKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential

_MAX_DOUBLINGS = 50

Drift = Callable[[Tensor, Tensor], Tensor]
Kick = Callable[[Tensor, Tensor, float], Tensor]


class LeapfrogKernel(TunedKernel):
    """Base of the kernels that move by leapfrog steps.

    Takes the options of :class:`~pyro_ebm.mcmc.kernels.tuned_kernel.TunedKernel`; the first step
    size is found by doubling if not given.
    """

    best_accept_prob = 0.8

    def find_step_size(self, potential: CapturedPotential, state: State) -> State:
        """Doubles or halves the step until the acceptance of one leapfrog crosses the wanted one.

        A step size that was given stays; none is found beyond fifty doublings or halvings.
        """
        direction = 0
        for _ in range(_MAX_DOUBLINGS if self.step_size is None else 0):
            p = draw_momentum(state)
            end, p_end = leapfrog(potential, state, p, state.tuning["step_size"], 1)
            _, info = metropolis(state, end, p, p_end, 1)
            rate = float(info["acceptance_rate"].mean())
            wanted = 1 if rate > self.target_accept_prob else -1
            if direction and wanted != direction:
                break
            direction = wanted
            state = state.with_tuning(step_size=state.tuning["step_size"] * 2.0**direction)
        return state


def draw_momentum(state: State) -> Tensor:
    """Draws whitened momenta from N(0, I), ``(C, D)``."""
    return torch.randn_like(state.position)


def total_energy(state: State, p: Tensor) -> Tensor:
    """Returns H in nats, ``(C,)``."""
    squares = torch.mv(p.square(), torch.ones_like(p[0]))  # a sum over a short dim is slower
    return state.potential + 0.5 * squares


def leapfrog(
    potential: CapturedPotential, state: State, p: Tensor, step_size: Tensor, num_steps: int
) -> tuple[State, Tensor]:
    """Returns the end of a trajectory, position and momentum.

    Args:
        potential: U and its gradient.
        state: Its beginning.
        p: Whitened momenta, ``(C, D)``.
        step_size: 0-d, or ``(C, 1)``; negative goes back in time.
        num_steps: L.
    """
    root = state.tuning["root"]
    q, u, gradient = state.position, state.potential, state.gradient
    if root.dim() == 1:
        drift, kick = _along_axes((step_size * root).expand_as(q).contiguous())
    else:
        drift, kick = _along_root(root, step_size)
    p = kick(p, gradient, 0.5)
    for i in range(num_steps):
        q = drift(q, p)
        u, gradient = potential(q)
        p = kick(p, gradient, 1.0 if i < num_steps - 1 else 0.5)
    return replace(state, position=q, potential=u, gradient=gradient), p


def _along_axes(scale: Tensor) -> tuple[Drift, Kick]:
    """Moves with a diagonal metric: one operation each.

    The scale is written out for all chains, ``(C, D)``: broadcasting along a short last dim takes
    several times longer than the sum itself.
    """
    return (
        lambda q, p: torch.addcmul(q, scale, p),
        lambda p, gradient, share: torch.addcmul(p, scale, gradient, value=-share),
    )


def _along_root(root: Tensor, step_size: Tensor) -> tuple[Drift, Kick]:
    """Moves with a dense metric."""
    return (
        lambda q, p: torch.addcmul(q, step_size, stretched(p, root)),
        lambda p, gradient, share: torch.addcmul(
            p, step_size, pulled_back(gradient, root), value=-share
        ),
    )


def metropolis(
    state: State, end: State, p_start: Tensor, p_end: Tensor, num_steps: int
) -> tuple[State, Info]:
    """Accepts or rejects the end of a trajectory, chain by chain.

    Args:
        state: Its beginning.
        end: Its end.
        p_start: Whitened momenta at the beginning, ``(C, D)``.
        p_end: Those at the end.
        num_steps: L, for the statistics.
    """
    energy = total_energy(state, p_start)
    error = total_energy(end, p_end) - energy
    error = torch.where(error.isnan(), torch.inf, error)
    moved, accept_prob = accept(state, end, -error)
    info = {
        "acceptance_rate": accept_prob,
        "diverging": error > MAX_ENERGY_ERROR,
        "energy": energy,
        "energy_error": error,
        "n_steps": torch.full_like(error, num_steps, dtype=torch.long),
    }
    return moved, info
