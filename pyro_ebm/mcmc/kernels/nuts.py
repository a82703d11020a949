r"""The no-U-turn sampler for a batch of chains: multinomial, iterative, in lockstep.

A trajectory doubles, forwards or backwards, until it turns back on itself; the next state is drawn
from all its points with weights :math:`e^{H_0 - H}`. For ends with momenta :math:`p_l, p_r` and the
sum :math:`\rho` of all momenta between, it has turned when

.. math:: p_l \cdot \tilde\rho \le 0 \quad\text{or}\quad p_r \cdot \tilde\rho \le 0, \qquad
          \tilde\rho = \rho - \tfrac12 (p_l + p_r)

in whitened coordinates. A doubling whose new half turns or diverges anywhere inside is discarded.
The new half of :math:`2^j` leaves is visited in order, and every balanced subtree in it is tested
by comparing the present leaf with its first one, kept in one of j slots: the slot of leaf n is the
number of ones in the binary digits of n without the last. All chains double together, so the slots
are the same for all; chains that have finished wait for the longest.

References:
    Hoffman, Gelman, The No-U-Turn Sampler, JMLR 15, 2014; Betancourt, A conceptual introduction to
    Hamiltonian Monte Carlo, 2017, arXiv:1701.02434; Phan, Pradhan, Jankowiak, Composable effects
    for flexible and accelerated probabilistic programming in NumPyro, 2019, arXiv:1912.11554.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.hamiltonian import (
    LeapfrogKernel,
    draw_momentum,
    leapfrog,
    total_energy,
)
from pyro_ebm.mcmc.kernels.kernel import MAX_ENERGY_ERROR, Info, State, chosen
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import whole


class NUTS(LeapfrogKernel):
    """The no-U-turn sampler on many chains.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        max_tree_depth: Doublings at most; the longest chain sets the pace of all.
        **options: Those of :class:`~pyro_ebm.mcmc.kernels.tuned_kernel.TunedKernel`.

    Example:
        >>> NUTS(lambda: None).max_tree_depth
        10
    """

    def __init__(self, target: Any = None, *, max_tree_depth: int = 10, **options: Any) -> None:
        super().__init__(target, **options)
        self.max_tree_depth = whole("max_tree_depth", max_tree_depth, least=1)

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain along a tree of its own size."""
        p = draw_momentum(state)
        energy = total_energy(state, p)
        tree = _Tree.of_one_point(state, p)
        for depth in range(self.max_tree_depth):
            tree = _double(potential, tree, depth, energy)
            if not bool(tree.active.any()):
                break
        info = {
            "acceptance_rate": tree.sum_accept / tree.num_leaves.clamp_min(1),
            "diverging": tree.diverging,
            "energy": energy,
            "energy_error": tree.proposal_energy - energy,
            "n_steps": tree.num_leaves,
            "tree_depth": tree.depth,
            "reached_max_treedepth": tree.active,
        }
        info["energy_error"] = torch.where(tree.moved, info["energy_error"], 0.0)
        return tree.proposal, info


@dataclass(frozen=True)
class _Tree:
    """Trajectories, one per chain; ``left`` is the past, ``right`` the future."""

    left: State
    right: State
    p_left: Tensor
    p_right: Tensor
    rho: Tensor
    proposal: State
    proposal_energy: Tensor
    log_weight: Tensor
    active: Tensor
    diverging: Tensor
    moved: Tensor
    depth: Tensor
    num_leaves: Tensor
    sum_accept: Tensor

    @classmethod
    def of_one_point(cls, state: State, p: Tensor) -> _Tree:
        zero = torch.zeros_like(state.potential)
        no, count = zero.bool(), zero.long()
        return cls(
            left=state,
            right=state,
            p_left=p,
            p_right=p,
            rho=p,
            proposal=state,
            proposal_energy=zero,
            log_weight=zero,
            active=~no,
            diverging=no,
            moved=no,
            depth=count,
            num_leaves=count,
            sum_accept=zero,
        )


@dataclass
class _Half:
    """The new half of a doubling while it grows."""

    end: State
    p_end: Tensor
    rho: Tensor
    proposal: State
    proposal_energy: Tensor
    log_weight: Tensor
    growing: Tensor
    turned: Tensor
    diverging: Tensor
    num_leaves: Tensor
    sum_accept: Tensor


def _double(potential: CapturedPotential, tree: _Tree, depth: int, energy: Tensor) -> _Tree:
    """Doubles the trajectories of active chains, each in a direction of its own."""
    forwards = torch.rand_like(tree.log_weight) < 0.5
    half = _grow(potential, tree, depth, energy, forwards)
    good = tree.active & ~half.turned & ~half.diverging
    takes = good & (torch.rand_like(energy).log() < half.log_weight - tree.log_weight)
    to_right, to_left = good & forwards, good & ~forwards
    rho = torch.where(good[:, None], tree.rho + half.rho, tree.rho)
    p_left = torch.where(to_left[:, None], half.p_end, tree.p_left)
    p_right = torch.where(to_right[:, None], half.p_end, tree.p_right)
    return replace(
        tree,
        left=chosen(to_left, half.end, tree.left),
        right=chosen(to_right, half.end, tree.right),
        p_left=p_left,
        p_right=p_right,
        rho=rho,
        proposal=chosen(takes, half.proposal, tree.proposal),
        proposal_energy=torch.where(takes, half.proposal_energy, tree.proposal_energy),
        log_weight=torch.where(
            good, torch.logaddexp(tree.log_weight, half.log_weight), tree.log_weight
        ),
        active=good & ~_is_turning(p_left, p_right, rho),
        diverging=tree.diverging | (tree.active & half.diverging),
        moved=tree.moved | takes,
        depth=tree.depth + tree.active.long(),
        num_leaves=tree.num_leaves + half.num_leaves,
        sum_accept=tree.sum_accept + half.sum_accept,
    )


def _grow(
    potential: CapturedPotential, tree: _Tree, depth: int, energy: Tensor, forwards: Tensor
) -> _Half:
    """Visits the leaves of the new half, one gradient for all chains at a time."""
    start = chosen(forwards, tree.right, tree.left)
    p = torch.where(forwards[:, None], tree.p_right, tree.p_left)
    half = _empty_half(start, p, tree.active)
    step_size = start.tuning["step_size"] * torch.where(forwards, 1.0, -1.0)[:, None]
    slots: list[tuple[Tensor, Tensor]] = [(p, p)] * max(depth, 1)
    for n in range(2**depth):
        _visit_next(potential, half, energy, step_size)
        first = (n >> 1).bit_count()
        if n % 2 == 0:
            slots[first] = (half.p_end, half.rho)
        else:
            _test_subtrees(half, slots, first, _trailing_ones(n))
        half.growing = half.growing & ~half.turned & ~half.diverging
        if not bool(half.growing.any()):
            break
    return half


def _empty_half(start: State, p: Tensor, active: Tensor) -> _Half:
    zero = torch.zeros_like(start.potential)
    return _Half(
        end=start,
        p_end=p,
        rho=torch.zeros_like(p),
        proposal=start,
        proposal_energy=zero,
        log_weight=torch.full_like(zero, -torch.inf),
        growing=active,
        turned=torch.zeros_like(active),
        diverging=torch.zeros_like(active),
        num_leaves=zero.long(),
        sum_accept=zero,
    )


def _visit_next(
    potential: CapturedPotential, half: _Half, energy: Tensor, step_size: Tensor
) -> None:
    """Adds one leaf to the halves that grow."""
    end, p = leapfrog(potential, half.end, half.p_end, step_size, 1)
    here = total_energy(end, p)
    error = torch.where(here.isnan(), torch.inf, here - energy)
    grows = half.growing
    half.diverging = half.diverging | (grows & (error > MAX_ENERGY_ERROR))
    log_weight = torch.where(grows, -error, -torch.inf)
    total = torch.logaddexp(half.log_weight, log_weight)
    takes = grows & (torch.rand_like(error).log() < log_weight - total)
    half.proposal = chosen(takes, end, half.proposal)
    half.proposal_energy = torch.where(takes, here, half.proposal_energy)
    half.log_weight = torch.where(grows, total, half.log_weight)
    half.end = chosen(grows, end, half.end)
    half.p_end = torch.where(grows[:, None], p, half.p_end)
    half.rho = torch.where(grows[:, None], half.rho + p, half.rho)
    half.num_leaves = half.num_leaves + grows.long()
    half.sum_accept = half.sum_accept + torch.where(grows, (-error).clamp(max=0.0).exp(), 0.0)


def _test_subtrees(
    half: _Half, slots: list[tuple[Tensor, Tensor]], last: int, num_subtrees: int
) -> None:
    """Tests the balanced subtrees that end at the present leaf, the smallest first."""
    for slot in range(last, last - num_subtrees, -1):
        p_first, rho_first = slots[slot]
        rho = half.rho - rho_first + p_first
        turned = _is_turning(p_first, half.p_end, rho)
        half.turned = half.turned | (half.growing & turned)


def _trailing_ones(n: int) -> int:
    return (~n & (n + 1)).bit_length() - 1


def _is_turning(p_first: Tensor, p_last: Tensor, rho: Tensor) -> Tensor:
    middle = rho - 0.5 * (p_first + p_last)
    return ((p_first * middle).sum(-1) <= 0) | ((p_last * middle).sum(-1) <= 0)
