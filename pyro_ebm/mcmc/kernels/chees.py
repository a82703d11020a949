r"""ChEES-HMC: HMC whose trajectory length is tuned by many chains together.

A good trajectory moves the distance from the centre most. ChEES, the change in the estimator of the
expected square,

.. math:: C(T) = \tfrac14\, E\big[(\|q' - m'\|^2 - \|q - m\|^2)^2\big],

has along a trajectory of length :math:`u T` the derivative :math:`\partial C / \partial \log T =
E[u T\, (\|q' - m'\|^2 - \|q - m\|^2)\, (q' - m')^\top v']` with the velocity :math:`v'` at the end.
Lengths are in units of the whitened coordinates, and chains count by their acceptance.

A longer trajectory also costs more, and on a Gaussian C has one maximum and then a plateau on which
nothing holds T back. So what is climbed is :math:`\log C - \alpha \log T` with :math:`\alpha =
1/4`: T settles where one per cent more length buys a quarter of a per cent more ChEES. The slope of
a logarithm has no scale, so that it is followed by plain stochastic approximation; both C and its
slope are averaged over the last iterations, because short and long u say different things.

References:
    Hoffman, Radul, Sountsov, An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian
    Monte Carlo, AISTATS 2021; Sountsov, Hoffman, Focusing on difficult directions for learning HMC
    trajectory lengths, 2021, arXiv:2110.11576 (a criterion per length).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.metric import whitened
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import positive

COST = 0.25  # alpha
MEMORY = 0.9  # of C and its slope, per iteration
RATE = 0.1  # of log T per unit of slope
MAX_SLOPE = 2.0
OUTLIER = 10.0  # medians


class ChEESHMC(HMC):
    """HMC with a trajectory length tuned by ChEES; wants 32 chains or more.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        max_trajectory_length: T at most, in units of the whitened coordinates: far beyond a period
            slopes are all noise. What T came to is in the state's ``tuning``.
        **options: Those of :class:`HMC`; ``trajectory_length`` is the first one, which is kept
            until the metric is known, and T never takes more than ``max_steps``.

    Example:
        >>> ChEESHMC(lambda: None).jitter
        True
    """

    def __init__(
        self, target: Any = None, *, max_trajectory_length: float = 20.0, **options: Any
    ) -> None:
        super().__init__(target, **options)
        self.max_trajectory_length = positive("max_trajectory_length", max_trajectory_length)

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns HMC's, and nothing seen of C."""
        zero = q.new_zeros(())
        return super().first_tuning(q) | {"criterion": zero, "criterion_slope": zero}

    def warm_step(
        self, potential: CapturedPotential, state: State, *, metric_is_final: bool
    ) -> tuple[State, Info]:
        """Moves every chain, and the trajectory length uphill."""
        moved, info, end, p_end = self.move(potential, state)
        if not metric_is_final:  # lengths are measured by the metric
            return moved, info
        weights = torch.where(torch.isfinite(p_end).all(-1), info["acceptance_rate"], 0.0)
        here, there = _centred(state, end, weights)
        velocity = torch.where(weights[:, None] > 0, p_end, 0.0)
        change = there.square().sum(-1) - here.square().sum(-1)
        change = change * _share_of_outliers(change)
        length = info["n_steps"][0] * state.tuning["step_size"]  # u T, rounded up to whole steps
        along = (there * velocity).sum(-1) * length
        total = weights.sum().clamp_min(1e-12)
        criterion = 0.25 * (weights * change.square()).sum() / total
        slope = (weights * change * along).sum() / total
        return moved.with_tuning(**_climb(state, criterion, slope, self._longest(state))), info

    def _longest(self, state: State) -> Tensor:
        """What T may be, by its own bound and that on the steps."""
        of_steps = self.max_steps * state.tuning["step_size"]
        return of_steps.clamp_max(self.max_trajectory_length)


def _centred(state: State, end: State, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened positions before and after, less their means over the chains."""
    there = torch.where(weights[:, None] > 0, end.position, state.position)
    centre = weights @ there / weights.sum().clamp_min(1e-12)
    root = state.tuning["root"]
    here = whitened(state.position - state.position.mean(0), root)
    return here, whitened(there - centre, root)


def _share_of_outliers(change: Tensor) -> Tensor:
    """What of each chain's change counts: one chain far out would say everything."""
    size = change.abs()
    return (OUTLIER * size.median() / size.clamp_min(1e-30)).clamp_max(1.0)


def _climb(state: State, criterion: Tensor, slope: Tensor, longest: Tensor) -> dict[str, Tensor]:
    """One step uphill of log C - alpha log T; T stays between one leapfrog step and the longest."""
    old = state.tuning
    criterion = MEMORY * old["criterion"] + (1.0 - MEMORY) * criterion
    slope = MEMORY * old["criterion_slope"] + (1.0 - MEMORY) * slope
    steepness = (slope / criterion.clamp_min(1e-30) - COST).clamp(-MAX_SLOPE, MAX_SLOPE)
    length = old["trajectory_length"].log() + RATE * steepness.nan_to_num(0.0)
    length = torch.minimum(length.exp(), longest).maximum(old["step_size"])
    return {"trajectory_length": length, "criterion": criterion, "criterion_slope": slope}
