r"""Parallel tempering with non-reversible swaps, for targets with a base that can be drawn.

Replicas k = 0..K sample :math:`p_\beta \propto \mathrm{base}\, e^{-\beta E}` on a ladder
:math:`0 = \beta_0 < \dots < \beta_K = 1`. Neighbours exchange states with probability

.. math:: \min\big(1, e^{(\beta_{k+1} - \beta_k)(E(q_{k+1}) - E(q_k))}\big),

even pairs at even iterations and odd pairs at odd ones: a state that has moved up keeps moving up,
and crosses the ladder in time K instead of :math:`K^2`. The replica at 0 draws afresh from the base
at every iteration, and stays only where the energy of the draw is infinite. In between all replicas
of all chains take one step of pCN, in one batch.

During warm-up the ladder is respaced so that all pairs are rejected equally often, and every
replica has a step size of its own, between 1e-4 and 1. The sum of rejection rates, the
communication barrier :math:`\Lambda`, says how many replicas are wanted: about :math:`2 \Lambda +
2`.

References:
    Syed, Bouchard-Côté, Deligiannidis, Doucet, Non-reversible parallel tempering, JRSS B 84, 2022.
    arXiv:1905.02939.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.prior_kernel import PriorKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import probability, whole

MIN_STEP_SIZE = 1e-4  # of a replica, as a share of the prior's scale; 1 is a fresh draw
RATE = 0.05  # of the log step size, per iteration of the warm-up
RESPACE_AT = (50, 100, 200, 400, 800, 1600)


class ParallelTempering(PriorKernel):
    r"""Non-reversible parallel tempering, for targets with a Gaussian base.

    Draws, statistics and the state's positions are those of the replica at :math:`\beta = 1`.

    Args:
        target: An ``EnergyDistribution`` or ``GeneralizedEBM`` with a Gaussian base or prior.
        num_replicas: K + 1, the ends at 0 and 1 included.
        target_accept_prob: What the step size of every replica is adapted to.
        adapt_ladder: Whether warm-up respaces the ladder: after 50 iterations, 100, 200 and so on,
            so that a shorter warm-up keeps it even.
        **options: Those of :class:`Kernel`: ``inverse_temperature``, of the coldest replica.

    Example:
        >>> ParallelTempering(lambda: None, num_replicas=6).num_replicas
        6
    """

    goes_on_from_position = False

    def __init__(
        self,
        target: Any = None,
        *,
        num_replicas: int = 8,
        target_accept_prob: float = 0.3,
        adapt_ladder: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        self.num_replicas = whole("num_replicas", num_replicas, least=2)
        self.target_accept_prob = probability("target_accept_prob", target_accept_prob)
        self.adapt_ladder = adapt_ladder

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns an even ladder and equal step sizes."""
        return {
            "ladder": torch.linspace(0.0, 1.0, self.num_replicas, dtype=q.dtype, device=q.device),
            "replica_step_sizes": q.new_full((self.num_replicas,), 0.5),
            "rejections": q.new_zeros(self.num_replicas - 1),
            "iteration": torch.zeros((), dtype=torch.long),
        }

    def init(self, potential: CapturedPotential, q: Tensor) -> State:
        """Returns the first state: all replicas of a chain start from the prior but the last."""
        state = super().init(potential, q)
        prior = self.prior(potential)
        others = torch.randn(self.num_replicas, *q.shape, dtype=q.dtype, device=q.device)
        replicas = torch.cat([(prior.loc + prior.scale * others)[:-1], q.unsqueeze(0)])
        energies = self._energies(potential, replicas)
        index = torch.arange(self.num_replicas, device=q.device)
        extra = {
            "replicas": replicas,
            "energies": energies,
            "labels": index.unsqueeze(1).repeat(1, len(q)),
            "round_trips": torch.zeros(len(q), dtype=torch.long, device=q.device),
        }
        return replace(state, extra=extra)

    def refreshed(self, potential: CapturedPotential, state: State) -> State:
        """Returns the state with energies of this target at every replica."""
        energies = self._energies(potential, state.extra["replicas"])
        if torch.equal(energies, state.extra["energies"]):
            return state
        fresh = replace(state, extra={**state.extra, "energies": energies})
        return self._at_top(potential, fresh)

    def _at_top(self, potential: CapturedPotential, state: State) -> State:
        """The state whose position and U are those of the replica at beta = 1."""
        top, energy = state.extra["replicas"][-1], state.extra["energies"][-1]
        u = energy - self.energy_of(potential, top, torch.zeros_like(energy))
        return replace(state, position=top, potential=u)

    def _energies(self, potential: CapturedPotential, replicas: Tensor) -> Tensor:
        """Energies of all replicas; one that is not finite counts as a wall."""
        energies = potential.energy(replicas.flatten(0, 1)).reshape(replicas.shape[:2])
        return torch.where(torch.isfinite(energies), energies, torch.inf)

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves all replicas, then swaps neighbours of one parity."""
        state, accept_prob = self._explore(potential, state)
        state, rejected = self._swap(state)
        tuning = {"iteration": state.tuning["iteration"] + 1}
        moved = self._at_top(potential, state).with_tuning(**tuning)
        info = {
            "acceptance_rate": accept_prob[-1],
            "swap_rejection_rate": rejected.mean(0),
            "round_trips": state.extra["round_trips"],
        }
        return moved, info

    def warm_step(
        self, potential: CapturedPotential, state: State, *, metric_is_final: bool
    ) -> tuple[State, Info]:
        """Moves and swaps, and tunes step sizes and ladder."""
        state, accept_prob = self._explore(potential, state)
        state = self._tuned(state, accept_prob)
        state, rejected = self._swap(state)
        kept = _averaged(state, rejected.mean(1))
        count = state.tuning["iteration"] + 1
        state = state.with_tuning(rejections=kept, iteration=count)
        if self.adapt_ladder and int(count) in RESPACE_AT:
            state = state.with_tuning(ladder=respaced(state.tuning["ladder"], kept))
        return self._at_top(potential, state), {"acceptance_rate": accept_prob[-1]}

    def _tuned(self, state: State, accept_prob: Tensor) -> State:
        change = RATE * (accept_prob.mean(1) - self.target_accept_prob)
        steps = (state.tuning["replica_step_sizes"].log() + change).exp().clamp(MIN_STEP_SIZE, 1.0)
        return state.with_tuning(replica_step_sizes=steps)

    def _explore(self, potential: CapturedPotential, state: State) -> tuple[State, Tensor]:
        """One step of pCN of every replica; fresh draws where the energy does not count."""
        prior, replicas = self.prior(potential), state.extra["replicas"]
        beta = state.tuning["ladder"][:, None]
        s = state.tuning["replica_step_sizes"].clone()
        s[0] = 1.0
        s = s[:, None, None]
        noise = prior.scale * torch.randn_like(replicas)
        proposal = prior.loc + (1.0 - s.square()).sqrt() * (replicas - prior.loc) + s * noise
        energies = self._energies(potential, proposal)
        log_ratio = beta * (state.extra["energies"] - energies)
        log_ratio[0] = 0.0
        log_ratio = torch.where(
            torch.isfinite(energies) & ~log_ratio.isnan(), log_ratio, -torch.inf
        )
        takes = torch.rand_like(log_ratio).log() < log_ratio
        extra = {
            **state.extra,
            "replicas": torch.where(takes[:, :, None], proposal, replicas),
            "energies": torch.where(takes, energies, state.extra["energies"]),
        }
        return replace(state, extra=extra), log_ratio.clamp(max=0.0).exp()

    def _swap(self, state: State) -> tuple[State, Tensor]:
        """Swaps the pairs of this iteration's parity; returns how likely all would be refused."""
        beta, energies = state.tuning["ladder"], state.extra["energies"]
        log_ratio = (beta[1:] - beta[:-1])[:, None] * (energies[1:] - energies[:-1])
        parity = int(state.tuning["iteration"]) % 2
        turn = (torch.arange(len(beta) - 1, device=beta.device) % 2 == parity)[:, None]
        swaps = turn & (torch.rand_like(log_ratio).log() < log_ratio)
        order = _order(swaps)
        extra = {
            "replicas": state.extra["replicas"].gather(0, _like(order, state.extra["replicas"])),
            "energies": energies.gather(0, order),
            "labels": state.extra["labels"].gather(0, order),
        }
        extra["labels"], trips = _count_trips(extra["labels"], state.extra["round_trips"])
        rejected = 1.0 - log_ratio.nan_to_num(-torch.inf).clamp(max=0.0).exp()
        return replace(state, extra={**extra, "round_trips": trips}), rejected


def _averaged(state: State, rejected: Tensor) -> Tensor:
    """The mean rejections of every pair since the ladder was last respaced."""
    at = int(state.tuning["iteration"])
    since = at - max((k for k in RESPACE_AT if k <= at), default=0)
    old = state.tuning["rejections"]
    return old + (rejected - old) / (since + 1)


def _order(swaps: Tensor) -> Tensor:
    """Which replica's state each replica gets, ``(K + 1, C)``; pairs do not overlap."""
    none = torch.zeros_like(swaps[:1])
    from_above, from_below = torch.cat([swaps, none]), torch.cat([none, swaps])
    index = torch.arange(len(swaps) + 1, device=swaps.device)[:, None]
    return index + from_above.long() - from_below.long()


def _like(order: Tensor, values: Tensor) -> Tensor:
    return order.unsqueeze(-1).expand_as(values)


def _count_trips(labels: Tensor, trips: Tensor) -> tuple[Tensor, Tensor]:
    """Counts states that reached 1 after they had been at 0: such a state carries a minus sign."""
    labels = labels.clone()
    bottom = labels[0]
    labels[0] = torch.where(bottom >= 0, -bottom - 1, bottom)
    arrived = labels[-1] < 0
    labels[-1] = torch.where(arrived, -labels[-1] - 1, labels[-1])
    return labels, trips + arrived.long()


def respaced(ladder: Tensor, rejections: Tensor) -> Tensor:
    """Returns the ladder on which every pair is rejected equally often.

    The rejections add up to the communication barrier as a function of beta, which is interpolated
    and cut into equal parts.

    Example:
        >>> even = torch.linspace(0.0, 1.0, 3)
        >>> respaced(even, torch.tensor([0.6, 0.2]))
        tensor([0.0000, 0.3333, 1.0000])
    """
    steps = rejections.clamp_min(1e-3)
    barrier = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    wanted = torch.linspace(0.0, 1.0, len(ladder), dtype=ladder.dtype, device=ladder.device)
    wanted = wanted * barrier[-1]
    above = torch.searchsorted(barrier, wanted[1:-1].contiguous()).clamp(1, len(ladder) - 1)
    share = (wanted[1:-1] - barrier[above - 1]) / (barrier[above] - barrier[above - 1])
    inner = ladder[above - 1] + share * (ladder[above] - ladder[above - 1])
    return torch.cat([ladder[:1], inner, ladder[-1:]])
