r"""Sequential Monte Carlo of discrete laws: many runs on one ladder in one batch.

Particles of the start get weights :math:`e^{-(\beta' - \beta) E}` from rung to rung, are resampled
by them within their own run, and take sweeps that keep :math:`f_{\beta'}`
(:mod:`~pyro_ebm.normalizers.discrete_path`). On a ladder that was there before, the product of the
mean weights of a run is unbiased for :math:`Z / Z_0`; the ladder comes from a run of its own, whose
weights are not used.

Reference:
    Del Moral, Doucet, Jasra, Sequential Monte Carlo samplers, JRSS B 68, 2006.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc.runs.smc import MAX_RUNGS, next_rung, systematic
from pyro_ebm.normalizers.discrete_path import DiscretePath
from pyro_ebm.ops.log_space import log_mean_exp

NUM_MOVES = 3
"""Sweeps at each rung."""

_ESS_SHARE = 0.9


def pilot_ladder(
    path: DiscretePath, num_particles: int, *, ess_share: float = _ESS_SHARE
) -> Tensor:
    """Returns inverse temperatures that keep an effective sample size, rising to 1, ``(K,)``.

    Walks over integers are tuned on the way, and held afterwards.

    Args:
        path: The laws between start and end.
        num_particles: Particles.
        ess_share: The effective sample size that is kept, over their number.

    Raises:
        RuntimeError: If a thousand rungs do not lead to the end.
    """
    x, beta, ladder = path.draw(num_particles), 0.0, list[float]()
    while beta < 1.0:
        if len(ladder) == MAX_RUNGS:
            raise RuntimeError(
                f"{path.law!r}: beta is {beta:.3g} after {MAX_RUNGS} rungs. The energy varies too "
                f"much over the {path.start}: use a base nearer to the law"
            )
        energy = path.energy(x)
        new = next_rung(beta, energy, ess_share * num_particles)
        x = path.move(x[systematic(-(new - beta) * energy)], new, NUM_MOVES, adapt=True)
        ladder.append(new)
        beta = new
    path.freeze()
    return torch.tensor(ladder, dtype=torch.float64)


def runs_on(
    path: DiscretePath,
    ladder: Tensor,
    *,
    num_runs: int,
    num_particles: int,
    num_moves: int = NUM_MOVES,
) -> Tensor:
    """Returns what independent runs say of log Z - log Z_0, ``(num_runs,)``.

    Args:
        path: The laws between start and end.
        ladder: Inverse temperatures, rising to 1, ``(K,)``.
        num_runs: Runs.
        num_particles: Particles of each.
        num_moves: Sweeps at each rung.

    Raises:
        NonFiniteEnergyError: If no particle of a run has a finite energy.

    Example:
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.ops.constraints import spins
        >>> law = EnergyDistribution(lambda x: 0.0 * x + 2.0, support=spins, event_shape=())
        >>> runs_on(DiscretePath(law), torch.tensor([1.0]), num_runs=2, num_particles=5).tolist()
        [-2.0, -2.0]
    """
    x, old = path.draw(num_runs * num_particles), 0.0
    total = torch.zeros(num_runs, dtype=torch.float64, device=x.device)
    for new in ladder.tolist():
        log_weights = -(new - old) * path.energy(x).reshape(num_runs, num_particles)
        if not bool(log_weights.isfinite().any(1).all()):
            raise NonFiniteEnergyError(
                f"{path.law!r}: no particle of a run has a finite energy: use more particles"
            )
        total = total + log_mean_exp(log_weights, 1)
        if new < 1.0:
            x = path.move(x[resampled(log_weights)], new, num_moves)
        old = new
    return total


def resampled(log_weights: Tensor) -> Tensor:
    """Returns which particles go on, ``(R * N,)``: each run's by weight among its own.

    Systematic, with one random number for each run.

    Args:
        log_weights: ``(R, N)``.

    Example:
        >>> none = -torch.inf
        >>> resampled(torch.tensor([[none, 0.0], [0.0, none]]))
        tensor([1, 1, 2, 2])
    """
    num_runs, num = log_weights.shape
    total = log_weights.double().softmax(1).cumsum(1)
    first = torch.rand((num_runs, 1), dtype=total.dtype, device=total.device)
    places = (torch.arange(num, dtype=total.dtype, device=total.device) + first) / num
    index = torch.searchsorted(total / total[:, -1:], places).clamp_max(num - 1)
    own = num * torch.arange(num_runs, device=index.device)[:, None]
    return (index + own).flatten()
