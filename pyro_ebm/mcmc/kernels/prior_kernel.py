"""What elliptical slice sampling and the preconditioned Crank–Nicolson walks share.

They keep a Gaussian prior by construction and look at the energy E alone, never at E - log prior:
counting the prior a second time is the classic mistake.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import State
from pyro_ebm.mcmc.kernels.pyro_kernel import PyroKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.target import GaussianPrior, gaussian_energy


class PriorKernel(PyroKernel):
    """Base of kernels that preserve a Gaussian prior."""

    needs_gradient = False

    def prior(self, potential: CapturedPotential) -> GaussianPrior:
        """Returns the target's Gaussian part.

        Raises:
            TypeError: If it has none.
        """
        found = potential.target.prior
        if found is None:
            raise TypeError(
                f"{type(self).__name__} needs a Gaussian base or prior with independent "
                f"coordinates, and {potential.target!r} has none: use HMC or MALA"
            )
        return found

    def draw_prior(self, potential: CapturedPotential, state: State) -> Tensor:
        """Draws from the prior, centred at zero, ``(C, D)``."""
        return torch.randn_like(state.position) * self.prior(potential).scale

    def init(self, potential: CapturedPotential, q: Tensor) -> State:
        """Returns the first state, with energies."""
        state = super().init(potential, q)
        energy = self.energy_of(potential, q, state.potential)
        return replace(state, extra={"energy": energy})

    def refreshed(self, potential: CapturedPotential, state: State) -> State:
        """Returns the state with energies of this target, as :meth:`Kernel.refreshed` does."""
        fresh = super().refreshed(potential, state)
        if fresh is state:
            return state
        energy = self.energy_of(potential, fresh.position, fresh.potential)
        return replace(fresh, extra={**state.extra, "energy": energy})

    def at(self, potential: CapturedPotential, state: State, q: Tensor) -> State:
        """Returns the state with other positions."""
        if self.needs_gradient:
            u, gradient = potential(q)
            energy = self.energy_of(potential, q, u)
        else:
            energy = potential.energy(q)
            nothing = torch.zeros_like(energy)
            u, gradient = energy - self.energy_of(potential, q, nothing), state.gradient
        return replace(state, position=q, potential=u, gradient=gradient, extra={"energy": energy})

    def energy_of(self, potential: CapturedPotential, q: Tensor, u: Tensor) -> Tensor:
        """Returns E at positions ``(C, D)`` of potential u, ``(C,)``."""
        return gaussian_energy(u, q, self.prior(potential))
