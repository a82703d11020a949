r"""Energies of chains along a ladder of inverse temperatures, from the base to the law.

Both :func:`~pyro_ebm.normalizers.thermodynamic.thermodynamic` and
:func:`~pyro_ebm.normalizers.thermodynamic.stepping_stones` read log Z off the energies of draws
from :math:`p_\beta \propto \mathrm{base}\, e^{-\beta E}` at rungs :math:`0 = \beta_0 < \dots <
\beta_K = 1`. On a Gaussian base they are those of parallel tempering, whose replicas change places
along the ladder, so that chains leave the modes that they are in. On another base chains are
carried up and held at every rung by a kernel with tuning and ladder of an SMC run. Chains of
discrete laws are carried up by sweeps, without a base from the uniform law on their states.

At :math:`\beta_0` the draws are fresh ones of the base. Chains are independent of each other, and
what they have in common between rungs is left in the errors: those compare whole chains.

Reference:
    Syed, Bouchard-Côté, Deligiannidis, Doucet, Non-reversible parallel tempering, JRSS B 84, 2022.
    arXiv:1905.02939.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MCMC, ParallelTempering
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.normalizers.ais import NUM_PILOTS, Path, finer
from pyro_ebm.normalizers.chain_size import MIN_CHAINS
from pyro_ebm.normalizers.discrete_path import DiscretePath, energies_at_rungs, is_discrete
from pyro_ebm.normalizers.discrete_smc import pilot_ladder
from pyro_ebm.normalizers.laws import KernelMaker, based, single
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.nan_energies import NaNCount


@dataclass(frozen=True)
class TemperedRun:
    """Energies of draws at every rung of a ladder.

    Args:
        ladder: Inverse temperatures, rising from 0 to 1, ``(K + 1,)``.
        energies: Energies relative to the base in nats, ``(K + 1, chains, draws)``; infinite where
            the law has no mass.
        seen: Energies at the base that were NaN, and are infinite here.
        num_stuck: Chains that did not move at all at some rung, whose draws are one.

    Raises:
        ValueError: If the ladder does not lead from 0 to 1, or there are too few chains.
        NonFiniteEnergyError: If an energy is NaN or minus infinity.
    """

    ladder: Tensor
    energies: Tensor
    seen: NaNCount = field(default_factory=NaNCount)
    num_stuck: int = 0

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is wrong with the draws, a sentence each."""
        if not self.num_stuck:
            return self.seen.remarks
        return (
            *self.seen.remarks,
            f"{self.num_stuck} of {self.energies.shape[1]} chains never moved at some rung, as "
            "from a far draw of the base, and bias the value beyond its error: take a base or "
            "prior that is nearer to the law, or a bridge from draws of it",
        )

    def __post_init__(self) -> None:
        ladder, shape = self.ladder, tuple(self.energies.shape)
        rises = bool((ladder.diff() > 0).all()) and ladder[[0, -1]].tolist() == [0.0, 1.0]
        if not rises or len(shape) != 3 or shape[0] != len(ladder):
            raise ValueError(
                "a tempered run needs a ladder that rises from 0 to 1 and energies (rungs, chains, "
                f"draws), got {ladder.tolist()} and {shape}"
            )
        if shape[1] < MIN_CHAINS:
            raise ValueError(
                f"{shape[1]} chains are too few to tell an error from: use {MIN_CHAINS} or more"
            )
        if bool((self.energies.isnan() | (self.energies == -torch.inf)).any()):
            raise NonFiniteEnergyError("an energy of a tempered run is NaN or minus infinity")


def tempered(
    dist: EnergyDistribution,
    *,
    num_rungs: int = 16,
    num_chains: int = 64,
    num_samples: int = 200,
    warmup_steps: int = 600,
    kernel: KernelMaker | None = None,
) -> TemperedRun:
    """Runs chains at all rungs of a ladder that is spaced by the law.

    Args:
        dist: A distribution with a base and ``batch_shape == ()``; one on finitely many states
            needs none.
        num_rungs: K; the base is one rung more.
        num_chains: Independent chains at every rung.
        num_samples: Draws of each.
        warmup_steps: Iterations before them; of chains that are held, half as many, at each rung.
            Chains start at the base, and with too few the modes of the law still have the base's
            weights: that is a bias, and in no error.
        kernel: Makes the kernel of chains that are held. If not given, and the base is a Gaussian
            with independent coordinates, parallel tempering; else HMC. Discrete laws take none:
            they move by sweeps.

    Raises:
        ValueError: If the distribution has nothing to start from or is a batch, or a kernel is
            given for a discrete one.
    """
    law = single(dist, "tempering")
    whole("num_rungs", num_rungs, least=2)
    whole("num_chains", num_chains, least=MIN_CHAINS)
    whole("num_samples", num_samples, least=4)
    if is_discrete(law):
        if kernel is not None:
            raise ValueError(f"{law!r} is discrete and moves by sweeps: leave kernel= out")
        return _swept(law, (num_rungs, num_chains, num_samples), warmup_steps // 2)
    law = based(dist, "tempering")
    if kernel is None and DistributionTarget(law).prior is not None:
        return _swapped(law, (num_rungs, num_chains, num_samples), warmup_steps)
    path = Path.piloted(law, num_rungs, kernel or HMC)
    return _held(path, num_chains, num_samples, warmup_steps // 2)


def _swapped(
    law: EnergyDistribution, shape: tuple[int, int, int], warmup_steps: int
) -> TemperedRun:
    """Energies at all replicas of parallel tempering."""
    num_rungs, num_chains, num_samples = shape
    kernel = ParallelTempering(law, num_replicas=num_rungs + 1)
    mcmc = MCMC(kernel, 1, warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run()
    target, state = DistributionTarget(law), mcmc.state
    if state is None:
        raise RuntimeError(f"{law!r}: the warm-up was interrupted")
    potential, rows = CapturedPotential(target), []
    for _ in range(num_samples):
        state, _ = kernel.step(potential, state)
        rows.append(state.extra["energies"][1:])
    seen = NaNCount()
    base = _at_base(potential, num_chains, num_samples, seen)
    energies = torch.cat([base, torch.stack(rows, -1)])
    return TemperedRun(state.tuning["ladder"].double(), energies, seen)


def _held(path: Path, num_chains: int, num_samples: int, burn_in: int) -> TemperedRun:
    """Energies of chains that are carried up rung by rung."""
    moving, weighing = CapturedPotential(path.kernel.bind()), CapturedPotential(path.target)
    q = path.target.draw_start(num_chains)
    seen = NaNCount()
    parts = [_at_base(weighing, num_chains, num_samples, seen)]
    stuck = torch.zeros(num_chains, dtype=torch.bool, device=q.device)
    for beta, tuning in zip(path.ladder, path.tunings, strict=True):
        path.beta.fill_(beta)
        state, rows = path.kernel.init(moving, q).with_tuning(**tuning), []
        for i in range(burn_in + num_samples):
            state, _ = path.kernel.step(moving, state)
            if i >= burn_in:
                rows.append(weighing.energy(state.position))
        stuck |= (state.position == q).all(1)
        q = state.position
        parts.append(torch.stack(rows, -1)[None])
    ladder = torch.cat([path.ladder.new_zeros(1), path.ladder]).double().to(q.device)
    return TemperedRun(ladder, torch.cat(parts), seen, int(stuck.sum()))


def _swept(law: EnergyDistribution, shape: tuple[int, int, int], burn_in: int) -> TemperedRun:
    """Energies of chains of a discrete law that are carried up rung by rung."""
    num_rungs, num_chains, num_samples = shape
    path = DiscretePath(law)
    ladder, _ = finer(pilot_ladder(path, NUM_PILOTS), num_rungs)
    path.seen = NaNCount()
    energies = energies_at_rungs(path, ladder, num_chains, num_samples, burn_in)
    return TemperedRun(
        torch.cat([ladder.new_zeros(1), ladder]).to(energies.device), energies, path.seen
    )


def _at_base(
    potential: CapturedPotential, num_chains: int, num_samples: int, seen: NaNCount
) -> Tensor:
    """Energies of fresh draws of the base, ``(1, chains, draws)``.

    Replicas of parallel tempering are no such draws where the energy is infinite: they stay.
    """
    target = potential.target
    energies = seen(potential.energy(target.draw_start(num_chains * num_samples)))
    return energies.reshape(1, num_chains, num_samples)
