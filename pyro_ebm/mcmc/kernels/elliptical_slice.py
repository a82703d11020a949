r"""Elliptical slice sampling: for a Gaussian prior and any energy, without a step size.

For :math:`p(q) \propto e^{-E(q)}\, N(q; m, \Sigma)` draw :math:`\nu \sim N(0, \Sigma)`; the ellipse
:math:`m + (q - m)\cos\theta + \nu\sin\theta` keeps the prior, and a slice
:math:`E(q') < E(q) - \log u` is found on it by shrinking a bracket of angles: nothing is
rejected, but for a chain that has found no point after 200 shrinks, which stays where it is. Chains
that have found their point wait for the others.

References:
    Murray, Adams, MacKay, Elliptical slice sampling, AISTATS 2010. arXiv:1001.0175.
"""

from __future__ import annotations

import math

import torch

from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.prior_kernel import PriorKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential

MAX_SHRINKS = 200


class EllipticalSlice(PriorKernel):
    """Elliptical slice sampling, for targets with a Gaussian base.

    A chain that stays where it is has an ``acceptance_rate`` of 0, all others of 1.

    Args:
        target: An ``EnergyDistribution`` or ``GeneralizedEBM`` whose base or prior is Gaussian with
            independent coordinates.

    Raises:
        TypeError: When run on a target without a Gaussian prior.

    Example:
        >>> EllipticalSlice(lambda: None).needs_gradient
        False
    """

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain to a new point of its slice."""
        loc, nu = self.prior(potential).loc, self.draw_prior(potential, state)
        centred, energy = state.position - loc, state.extra["energy"]
        slice_at = energy - torch.rand_like(energy).log()
        angle = 2.0 * math.pi * torch.rand_like(energy)
        low, high = angle - 2.0 * math.pi, angle
        found = torch.zeros_like(energy, dtype=torch.bool)
        q = state.position
        num_tries = torch.zeros_like(energy, dtype=torch.long)
        for _ in range(MAX_SHRINKS):
            at = loc + centred * angle.cos()[:, None] + nu * angle.sin()[:, None]
            value = potential.energy(at)
            hit = ~found & (value < slice_at) & torch.isfinite(value)
            num_tries = num_tries + (~found).long()
            q = torch.where(hit[:, None], at, q)
            found = found | hit
            if bool(found.all()):
                break
            low = torch.where(angle < 0, angle, low)
            high = torch.where(angle < 0, high, angle)
            angle = torch.where(found, angle, low + (high - low) * torch.rand_like(angle))
        info = {"acceptance_rate": found.to(energy.dtype), "n_steps": num_tries}
        return self.at(potential, state, q), info
