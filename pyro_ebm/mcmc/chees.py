r"""ChEES-HMC: HMC whose trajectory length is tuned by many chains together.

A trajectory is as long as it should be when it moves the distance from the centre most. ChEES, the
change in the estimator of the expected square,

.. math:: \tfrac14\, E\big[(\|q' - m'\|^2 - \|q - m\|^2)^2\big],

is climbed by Adam on :math:`\log T`. Along the trajectory of length :math:`u T` the derivative of
one chain's term is :math:`u T\, (\|q' - m'\|^2 - \|q - m\|^2)\, (q' - m')^\top v'` with the
velocity :math:`v'` at the end; chains are weighted by acceptance. The step size is tuned to the
harmonic mean of acceptance, which a few stuck chains pull down.

References:
    Hoffman, Radul, Sountsov, An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian
    Monte Carlo, AISTATS 2021.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.hmc import HMC, MAX_STEPS
from pyro_ebm.mcmc.kernel import Info, State

RATE, BETA2 = 0.05, 0.95
LARGEST_CHANGE = 0.35  # of log T, in one iteration
OUTLIER = 10.0  # medians


class ChEESHMC(HMC):
    """HMC with a trajectory length tuned by ChEES; wants 32 chains or more.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        trajectory_length: The first length, in units of the whitened coordinates.
        **options: Those of :class:`HMC`; ``target_accept_prob`` is .651, best for many chains.

    Example:
        >>> ChEESHMC(lambda: None).target_accept_prob
        0.651
    """

    best_accept_prob = 0.651
    uses_harmonic_mean = True

    def __init__(
        self, target: Any = None, *, trajectory_length: float = 1.0, **options: Any
    ) -> None:
        super().__init__(target, trajectory_length=trajectory_length, **options)

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns HMC's, and the memory of Adam."""
        zero = q.new_zeros(())
        adam = {"adam_square": zero, "adam_count": zero}
        return super().first_tuning(q) | adam

    def warm_step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain, and the trajectory length uphill."""
        moved, info, end, p_end = self.move(potential, state)
        slope = _chees_slope(state, end, p_end, info["acceptance_rate"]) * self.share(state)
        return moved.with_tuning(**_climb(state, slope)), info


def _chees_slope(state: State, end: State, p_end: Tensor, weights: Tensor) -> Tensor:
    """The derivative of ChEES in log T, in whitened coordinates, weighted by acceptance."""
    inverse_mass = state.tuning["inverse_mass"]
    scale = inverse_mass.rsqrt()
    finite = torch.isfinite(end.position).all(-1)
    weights = torch.where(finite, weights, 0.0)[:, None]
    there = torch.where(finite[:, None], end.position, state.position) * scale
    here = state.position * scale
    centre = (weights * there).sum(0) / weights.sum().clamp_min(1e-12)
    there, here = there - centre, here - here.mean(0)
    velocity = torch.where(finite[:, None], p_end, 0.0) * inverse_mass.sqrt()
    change = there.square().sum(-1) - here.square().sum(-1)
    slopes = change * (there * velocity).sum(-1) * state.tuning["trajectory_length"]
    # One chain far out would say everything, and Adam would remember it for long.
    bound = OUTLIER * slopes.abs().median()
    slopes = torch.minimum(torch.maximum(slopes, -bound), bound)
    return (weights[:, 0] * slopes).sum() / weights.sum().clamp_min(1e-12)


def _climb(state: State, slope: Tensor) -> dict[str, Tensor]:
    """One step of Adam on log T; steps are bounded, and T stays between one step and a thousand."""
    tuning = state.tuning
    slope = torch.where(torch.isfinite(slope), slope, 0.0)
    count = tuning["adam_count"] + 1
    square = BETA2 * tuning["adam_square"] + (1.0 - BETA2) * slope.square()
    corrected = square / (1.0 - BETA2**count)
    change = (RATE * slope / (corrected.sqrt() + 1e-8)).clamp(-LARGEST_CHANGE, LARGEST_CHANGE)
    log_length = tuning["trajectory_length"].log() + change
    step = tuning["step_size"].log()
    log_length = torch.minimum(torch.maximum(log_length, step), step + math.log(MAX_STEPS))
    return {"trajectory_length": log_length.exp(), "adam_square": square, "adam_count": count}
