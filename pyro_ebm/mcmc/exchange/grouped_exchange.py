r"""Exchange in a hierarchical model: every group of a plate is accepted by itself.

With groups that have parameters :math:`\theta_g` and a :math:`Z(\theta_g)` of their own, under
shared parameters :math:`\phi`, one decision for all groups together would be right, and its noise
grows with their number. Given :math:`\phi` the groups are independent, so that one sweep is

1. a jump of every :math:`\theta_g`, each with its own auxiliary data set and accepted by itself,

   .. math:: \log\alpha_g = \ell_g(\phi, \theta'_g) - \ell_g(\phi, \theta_g)
       + [E_{\theta'_g}(y_g) - E_{\theta_g}(y_g)],

   with the group's part :math:`\ell_g` of the log density without Z;
2. some jumps of :math:`\phi`, which need no auxiliary data as long as no natural parameter depends
   on :math:`\phi` itself, and else those of all groups.

Both forms of a hierarchy serve. In the centred one, :math:`\theta_g \sim N(\mu, \tau)`, shared
jumps cost no auxiliary data; in :math:`\theta_g = \mu + \tau z_g` every jump of :math:`\mu` moves
all groups and draws for all of them, and is accepted or not by all together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.exchange.exchange_kernel import ExchangeKernel, target_of
from pyro_ebm.mcmc.exchange.exchange_target import ExchangeTarget
from pyro_ebm.mcmc.exchange.group_terms import GroupTerms
from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.metropolis import decisions
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import probability, whole

_GAIN, _DECAY = 2.0, 0.6  # of the groups' log jump sizes, per iteration of the warm-up


class GroupedExchange(ExchangeKernel):
    """Exchange with the groups of a plate accepted one by one, many chains in one batch.

    Shared parameters move given those of the groups. One that stands in every group's energy, as
    ``field`` does below, is correlated with theirs and mixes slowly: with few groups compare
    :class:`Exchange`, which moves all at once.

    Args:
        model: A Pyro model, as for :class:`Exchange`; its plate of groups holds latents.
        plate: The name of that plate: a context, or a loop whose turns have as many latents each;
            in a loop the data of groups may differ in size.
        group_accept_prob: What each group's jump size is adapted to.
        num_shared_moves: Jumps of the shared parameters in one iteration.
        **options: Those of :class:`Exchange`; ``target_accept_prob`` and ``step_size`` are of the
            shared parameters.

    Raises:
        ValueError: When run, if there is no such plate, it holds no latent, or its elements are not
            independent given the rest, or are turns of a loop with latents of different sizes.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.energies import Ising
        >>> from pyro_ebm.mcmc import MCMC
        >>> def model(images):
        ...     field = pyro.sample("field", dist.Normal(0.0, 0.5))
        ...     with pyro.plate("groups", len(images)):
        ...         coupling = pyro.sample("coupling", dist.Uniform(0.0, 0.4))
        ...         law = EnergyDistribution(Ising(coupling, (13, 13), field=field))
        ...         pyro.sample("image", law, obs=images)
        >>> kernel = GroupedExchange(model, "groups")
        >>> mcmc = MCMC(kernel, 3, 3, num_chains=4, disable_progbar=True)
        >>> mcmc.run(Ising(0.2, (13, 13), field=0.3).sample((3,)))
        >>> mcmc.get_samples()["coupling"].shape
        torch.Size([4, 3, 3])
    """

    def __init__(
        self,
        model: Any,
        plate: str,
        *,
        group_accept_prob: float = 0.35,
        num_shared_moves: int = 4,
        target_accept_prob: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(model, target_accept_prob=target_accept_prob, **options)
        self.plate = plate
        self.group_accept_prob = probability("group_accept_prob", group_accept_prob)
        self.num_shared_moves = whole("num_shared_moves", num_shared_moves, least=1)

    def bind(self, *args: Any, initial_params: Any = None, **kwargs: Any) -> ExchangeTarget:
        """Returns the model as a target, and finds its groups."""
        target = super().bind(*args, initial_params=initial_params, **kwargs)
        self.groups = GroupTerms(target, self.plate)
        return target

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns jump sizes and unit scales of groups and shared parameters."""
        number, size = self.groups.blocks.shape
        return {
            **super().first_tuning(q),
            "group_step_size": q.new_full((number,), self.step_size or 1.0),
            "group_root": torch.eye(size, dtype=q.dtype, device=q.device).repeat(number, 1, 1),
            "shared_root": torch.eye(len(self.groups.shared), dtype=q.dtype, device=q.device),
            "group_updates": q.new_zeros(()),
            "seen": q.new_zeros(q.shape[1]),
        }

    # --- one iteration

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every group, then what they share."""
        state, accepted, reach = self._move_groups(potential, state)
        state, info = self._move_shared(potential, state, accepted)
        return state, {**info, **reach}

    def warm_step(
        self, potential: CapturedPotential, state: State, *, metric_is_final: bool
    ) -> tuple[State, Info]:
        """Moves, and tunes the jumps of every group by what all chains accepted."""
        state = self._with_metric(state)
        state, accepted, _ = self._move_groups(potential, state)
        return self._move_shared(potential, self._tuned(state, accepted), accepted)

    def _move_groups(
        self, potential: CapturedPotential, state: State
    ) -> tuple[State, Tensor, Info]:
        """The state after a jump of every group, how likely each was, ``(C, G)``, and its reach."""
        groups, target = self.groups, target_of(potential)
        q = self._jumped(state)
        new, log_ratio = target.naturals(q), groups(q) - groups(state.position)
        for name in groups.site_places:
            terms = self.log_ratios(target, name, state.extra, new)
            log_ratio = log_ratio + groups.sums_of(name, terms)
        moves, accept_prob = decisions(log_ratio)
        moved = self.at(potential, state, groups.joined(moves, q, state.position))
        return moved, accept_prob, self.reach(target, new)

    def _jumped(self, state: State) -> Tensor:
        """Positions after a jump in the coordinates of every group."""
        blocks, q = self.groups.blocks, state.position.clone()
        noise = torch.randn(len(q), *blocks.shape, dtype=q.dtype, device=q.device)
        jumps = torch.einsum("gij,cgj->cgi", state.tuning["group_root"], noise)
        q[:, blocks] += state.tuning["group_step_size"][:, None] * jumps
        return q

    def _move_shared(
        self, potential: CapturedPotential, state: State, accepted: Tensor
    ) -> tuple[State, Info]:
        mean = accepted.mean(1)
        if len(self.groups.shared) == 0:
            return state, {"acceptance_rate": mean}
        infos = []
        for _ in range(self.num_shared_moves):
            to = self.at(potential, state, self._shared_jumped(state))
            state, info = self.decided(potential, state, to)
            infos.append(info)
        rate = torch.stack([info["acceptance_rate"] for info in infos]).mean(0)
        lost = torch.stack([info["non_finite"] for info in infos]).any(0)
        return state, {
            "acceptance_rate": rate,
            "non_finite": lost,
            "group_acceptance_rate": mean,
        }

    def _shared_jumped(self, state: State) -> Tensor:
        """Positions after a jump in the shared coordinates."""
        shared, q = self.groups.shared, state.position.clone()
        noise = torch.randn(len(q), len(shared), dtype=q.dtype, device=q.device)
        q[:, shared] += state.tuning["step_size"] * (noise @ state.tuning["shared_root"].T)
        return q

    # --- tuning

    def _with_metric(self, state: State) -> State:
        """The state with jumps that follow the metric of all coordinates, where that is new."""
        root = state.tuning["root"]
        variances = root.square().sum(-1) if root.dim() == 2 else root.square()
        if torch.equal(variances, state.tuning["seen"]):
            return state
        covariance = root @ root.T if root.dim() == 2 else root.square().diag()
        blocks, shared = self.groups.blocks, self.groups.shared
        of_groups = covariance[blocks[:, :, None], blocks[:, None, :]]
        return state.with_tuning(
            group_root=torch.linalg.cholesky(of_groups),
            shared_root=torch.linalg.cholesky(covariance[shared[:, None], shared]),
            group_updates=torch.zeros_like(state.tuning["group_updates"]),
            seen=variances,
        )

    def _tuned(self, state: State, accepted: Tensor) -> State:
        """The state with jump sizes nearer to the wanted acceptance, by Robbins and Monro."""
        count = state.tuning["group_updates"] + 1.0
        gap = accepted.mean(0) - self.group_accept_prob
        size = state.tuning["group_step_size"] * torch.exp(_GAIN * count**-_DECAY * gap)
        return state.with_tuning(group_step_size=size, group_updates=count)
