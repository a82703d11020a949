"""What ``EnergyDistribution.sample`` does where neither the energy nor the user says how to draw.

A few hundred steps of a small kernel (MALA through the support's bijection, Gibbs on finite
supports), started from the base, on at least 16 chains so that rank R-hat can judge the result.
Good enough for prototypes and a first look; for answers use MCMC.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.distributions.call_stack import is_prototype_run, is_sequential_predictive
from pyro_ebm.distributions.layers import unvalidated
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.ops.initial_points import initial_points, like_of
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.ops.short_chain import short_chain
from pyro_ebm.typing import is_exact_sampler

MIN_CHAINS = 16
MAX_RHAT = 1.2
_MAX_ROWS = 1024
_sequential_calls: dict[tuple[int, ...], int] = {}


class Target(Protocol):
    """What is asked of the distribution that is to be drawn."""

    base: Any
    energy_function: Any
    support: Constraint
    batch_shape: torch.Size
    event_shape: torch.Size

    def potential(self, x: Tensor) -> Tensor:
        """Returns U(x) in nats."""


def draw(target: Target, shape: torch.Size) -> Tensor:
    """Returns approximate draws of shape ``shape + batch_shape + event_shape``.

    Warns:
        ApproximateSampleWarning: If rank R-hat of a coordinate or of the potential exceeds 1.2, or
            if sequential ``Predictive`` pays for a chain at every draw.
    """
    _count_sequential(shape + target.batch_shape + target.event_shape)
    batch = _full_batch(target)
    init = _start(target, _num_chains(shape.numel(), batch.numel()), batch)
    potential = unvalidated(target).potential
    result = short_chain(potential, target.support, init, event_dim=len(target.event_shape))
    if result.rhat > MAX_RHAT and not is_prototype_run():
        warnings.warn(
            f"{target!r}.sample() ran a short chain that has not converged (rank R-hat "
            f"{result.rhat:.2f} > {MAX_RHAT}): use MCMC for answers, or pass sampler= to the "
            "distribution",
            ApproximateSampleWarning,
            stacklevel=4,
        )
    return result.draws[: shape.numel()].reshape(shape + batch + target.event_shape)


def draw_exactly(target: Target, shape: torch.Size) -> Tensor:
    """Returns draws of an energy that samples itself, independent along expanded batch dims too."""
    energy = target.energy_function
    own, batch = own_batch(energy), target.batch_shape
    lead, tail = batch[: len(batch) - len(own)], batch[len(batch) - len(own) :]
    wide = [i for i, (have, want) in enumerate(zip(own, tail, strict=True)) if have != want]
    draws = energy.sample(shape + lead + torch.Size(tail[i] for i in wide))
    start = len(shape) + len(lead)
    for k, i in enumerate(wide):
        draws = draws.transpose(start + k, start + len(wide) + i)
    return draws.reshape(shape + batch + target.event_shape)


def own_batch(energy: Any) -> torch.Size:
    """Returns the batch shape of an energy that knows it: that of its parameters."""
    if is_exact_sampler(energy):
        return energy.batch_shape
    return energy.log_normalizer().shape


def _num_chains(wanted: int, batch: int) -> int:
    """At least the draws asked for, and 16 for R-hat unless the batch makes that dear."""
    return max(wanted, min(MIN_CHAINS, max(2, _MAX_ROWS // max(batch, 1))))


def _full_batch(target: Target) -> torch.Size:
    """The batch shape with the dims that batched parameters of the energy add on its left."""
    with rng_preserved():
        probe = _start(target, 1, target.batch_shape)[0]
    return target.potential(probe).shape


def _start(target: Target, chains: int, batch: torch.Size) -> Tensor:
    extra = batch[: len(batch) - len(target.batch_shape)]
    if target.base is not None:
        return target.base.sample(torch.Size((chains,)) + extra)
    like = like_of(target.energy_function)
    return initial_points(
        target.support,
        torch.Size((chains,)) + batch,
        target.event_shape,
        dtype=like.dtype,
        device=like.device,
    )


def _count_sequential(shape: torch.Size) -> None:
    if not is_sequential_predictive():
        return
    count = _sequential_calls[shape] = _sequential_calls.get(shape, 0) + 1
    if count == 11:
        warnings.warn(
            "sequential Predictive runs a chain for every draw of an EnergyDistribution: "
            "Predictive(..., parallel=True) runs one batch of chains for all draws",
            ApproximateSampleWarning,
            stacklevel=5,
        )
