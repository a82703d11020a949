r"""Sequential Monte Carlo: particles carried from the base to the target along a ladder.

Particles are exact draws of the base. At every rung from :math:`\beta` to :math:`\beta'` they get
weights :math:`e^{-(\beta' - \beta) E}`, are resampled by them, and take a few steps of a kernel
that keeps :math:`p_{\beta'} \propto \mathrm{base}\, e^{-\beta' E}`. The product of the mean weights
estimates Z.

Without a plan each rung goes as far as the weights keep a wanted effective sample size, and the
kernel is tuned by the particles. Such a run is consistent, but its estimate of Z is biased, at some
hundred particles by several per cent: the ladder and the weights are from the same particles. A
second run with the first one's :attr:`SMC.plan` is unbiased. Everything must be reached from the
base: a mode that no particle found in time is missing, and nothing here can tell.

References:
    Del Moral, Doucet, Jasra, Sequential Monte Carlo samplers, JRSS B 68, 2006; Jasra, Stephens,
    Doucet, Tsagaris, Inference for Lévy-driven stochastic volatility models via adaptive sequential
    Monte Carlo, Scandinavian Journal of Statistics 38, 2011 (the adaptive ladder).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import ApproximateSampleWarning, NonFiniteEnergyError
from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.kernels.kernel import Kernel, State, check_untempered
from pyro_ebm.mcmc.kernels.metric import MetricEstimate, resolved
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.ops.arguments import probability, whole
from pyro_ebm.ops.log_space import effective_sample_size, log_mean_exp
from pyro_ebm.ops.nan_energies import NaNCount

MAX_RUNGS = 1000
_HALVINGS = 50
_LOW_ESS = 0.1
_BAR = "SMC: beta {n:.3f} |{bar}| {elapsed}"


@dataclass(frozen=True)
class SMCPlan:
    """What a run is not to adapt.

    Args:
        ladder: Inverse temperatures after each rung, rising to 1, ``(K,)``.
        tunings: The kernel's tuning at each rung.

    Raises:
        ValueError: If the ladder does not rise to 1, or there is not a tuning for each rung.
    """

    ladder: Tensor
    tunings: tuple[dict[str, Tensor], ...]

    def __post_init__(self) -> None:
        rises = bool((self.ladder.diff() > 0).all()) and float(self.ladder[-1]) == 1.0
        if not rises or len(self.tunings) != len(self.ladder):
            raise ValueError(
                "a plan needs a ladder that rises to 1 and a tuning for each of its rungs, got "
                f"{self.ladder.tolist()} and {len(self.tunings)} tunings"
            )


@dataclass
class _Rungs:
    """What a run has seen, rung by rung."""

    ladder: list[float] = field(default_factory=list)
    tunings: list[dict[str, Tensor]] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    acceptance_rate: list[float] = field(default_factory=list)
    log_normalizer: list[float] = field(default_factory=list)
    num_ancestors: list[int] = field(default_factory=list)
    nan_energies: NaNCount = field(default_factory=NaNCount)


class SMC:
    r"""Annealed sampling of a distribution from its base.

    Args:
        dist: An ``EnergyDistribution`` or ``GeneralizedEBM`` with a base and ``batch_shape == ()``.
        num_particles: N.
        kernel: Makes the kernel of the moves; HMC by default.
        num_moves: Steps of the kernel at each rung.
        ess_share: The effective sample size that an adaptive rung keeps, over N.
        plan: A former run's :attr:`plan`: its ladder and tuning are kept, and the estimate of Z is
            unbiased.
        disable_progbar: Hides the progress bar.

    Raises:
        ValueError: If the distribution has no base.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
        >>> smc = SMC(law, 500, disable_progbar=True)
        >>> smc.run()
        >>> smc.get_samples()["x"].shape
        torch.Size([500])
        >>> abs(float(smc.log_normalizer) + 0.3466) < 0.1  # log Z = -log(2) / 2
        True
    """

    def __init__(
        self,
        dist: EnergyDistribution,
        num_particles: int = 1000,
        *,
        kernel: Callable[[EnergyDistribution], Kernel] = HMC,
        num_moves: int = 3,
        ess_share: float = 0.9,
        plan: SMCPlan | None = None,
        disable_progbar: bool = False,
    ) -> None:
        self.target = DistributionTarget(dist)
        if self.target.law.base is None:
            raise ValueError(
                f"SMC starts from exact draws of the base, and {dist!r} has none: give base="
            )
        if dist.batch_shape != ():
            raise ValueError(
                f"SMC samples one law, and batch_shape is {tuple(dist.batch_shape)}: run the "
                "elements one by one"
            )
        self.dist = dist
        self.num_particles = whole("num_particles", num_particles, least=2)
        self.kernel = kernel
        self.num_moves = whole("num_moves", num_moves, least=1)
        self.ess_share = probability("ess_share", ess_share)
        self.given_plan = plan
        self.disable_progbar = disable_progbar
        self._rungs = _Rungs()
        self._particles: Tensor | None = None

    # --- running

    def run(self) -> None:
        """Carries the particles from the base to the target.

        Raises:
            NonFiniteEnergyError: If no particle has a finite energy.
            TypeError: If the kernel is unadjusted, or remembers more than positions.
            ValueError: If the energy has noise in it, or that of a particle depends on others.

        Warns:
            ApproximateSampleWarning: If at a rung less than a tenth of the particles counted, or
                energies were NaN.
        """
        self._particles = None
        q = self.target.draw_start(self.num_particles)
        beta = q.new_zeros(())  # raised in place, and the law follows
        kernel = self._kernel_at(beta)
        potential = CapturedPotential(kernel.bind(), capture=False)
        weighing = CapturedPotential(self.target, capture=False)
        self._rungs = rungs = _Rungs()
        weighing.check_density(q)
        ancestors = torch.arange(len(q), device=q.device)
        tuning: dict[str, Tensor] | None = None
        with tqdm(total=1.0, disable=self.disable_progbar, bar_format=_BAR) as bar:
            while float(beta) < 1.0:
                log_weights = self._climb(beta, weighing.energy(q))
                index = systematic(log_weights)
                q, ancestors = q[index], ancestors[index]
                q, tuning = self._move(kernel, potential, q, tuning)
                rungs.num_ancestors.append(len(ancestors.unique()))
                bar.update(float(beta) - bar.n)
        self._particles = q
        if rungs.nan_energies.number:
            warnings.warn(
                f"{self.dist!r}: energies of some particles are NaN and count as infinite "
                "(nan_energies says how many): return inf where there is no mass",
                ApproximateSampleWarning,
                stacklevel=2,
            )

    def _kernel_at(self, beta: Tensor) -> Kernel:
        """The kernel of the moves, whose law follows beta."""
        kernel = self.kernel(self.target.law.temper(beta))
        check_untempered(kernel, "SMC")
        if not (kernel.adjusted and kernel.goes_on_from_position):
            raise TypeError(
                "SMC needs a kernel that keeps its target from any position, and "
                f"{type(kernel).__name__} does not: use HMC or MALA"
            )
        return kernel

    def _climb(self, beta: Tensor, energy: Tensor) -> Tensor:
        """Raises beta in place to the next rung; returns the log weights, ``(N,)``."""
        energy = self._rungs.nan_energies(energy).double()
        if not bool(torch.isfinite(energy).any()):
            raise NonFiniteEnergyError(f"{self.dist!r}: no particle has a finite energy")
        if bool((energy == -torch.inf).any()):
            raise NonFiniteEnergyError(f"{self.dist!r}: the energy is minus infinity at a particle")
        old = float(beta)
        new = self._next_rung(old, energy)
        beta.fill_(new)
        log_weights = -(new - old) * energy
        rungs, ess = self._rungs, float(effective_sample_size(log_weights))
        rungs.ladder.append(new)
        rungs.ess.append(ess)
        rungs.log_normalizer.append(float(log_mean_exp(log_weights)))
        if ess < _LOW_ESS * len(energy):
            warnings.warn(
                f"from beta {old:.3g} to {new:.3g} only {ess:.0f} of {len(energy)} particles "
                "counted: use a finer ladder",
                ApproximateSampleWarning,
                stacklevel=3,
            )
        return log_weights

    def _next_rung(self, old: float, energy: Tensor) -> float:
        if self.given_plan is not None:
            return float(self.given_plan.ladder[len(self._rungs.ladder)])
        if len(self._rungs.ladder) == MAX_RUNGS:
            raise RuntimeError(
                f"{self.dist!r}: beta is {old:.3g} after {MAX_RUNGS} rungs. The energy varies too "
                "much over the base: use a base nearer to the target"
            )
        return next_rung(old, energy, self.ess_share * len(energy))

    def _move(
        self,
        kernel: Kernel,
        potential: CapturedPotential,
        q: Tensor,
        tuning: dict[str, Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Steps of the kernel; returns the tuning for the next rung."""
        state = self._tuned(kernel, potential, kernel.init(potential, q), tuning)
        rates = []
        self._rungs.tunings.append(dict(state.tuning))
        for _ in range(self.num_moves):
            state, info = kernel.step(potential, state)
            rates.append(float(info["acceptance_rate"].mean()))
        rate = sum(rates) / len(rates)
        self._rungs.acceptance_rate.append(rate)
        return state.position, _followed(kernel, state.tuning, rate)

    def _tuned(
        self,
        kernel: Kernel,
        potential: CapturedPotential,
        state: State,
        tuning: dict[str, Tensor] | None,
    ) -> State:
        if self.given_plan is not None:
            return state.with_tuning(**self.given_plan.tunings[len(self._rungs.tunings)])
        if kernel.adapt_mass_matrix:
            estimate = MetricEstimate(resolved(kernel.metric, *state.position.shape))
            estimate.update(state)
            state = state.with_tuning(root=estimate.root(state.position))
        if tuning is None:
            return kernel.find_step_size(potential, state)
        return state.with_tuning(**{k: v for k, v in tuning.items() if k == "step_size"})

    # --- reading

    def get_samples(self) -> Values:
        """Returns the particles by name, ``(N,) + event_shape``; all of the same weight.

        Raises:
            RuntimeError: If :meth:`run` was not called.
        """
        if self._particles is None:
            raise RuntimeError("nothing was drawn yet: call run() first")
        return self.target.constrain(self._particles)

    @property
    def log_normalizer(self) -> Tensor:
        """The log of the estimate of Z in nats, with respect to the base, 0-d."""
        self.get_samples()
        return torch.tensor(self._rungs.log_normalizer, dtype=torch.float64).sum()

    @property
    def nan_energies(self) -> NaNCount:
        """Which of the energies that were weighed were NaN, and counted as infinite."""
        return self._rungs.nan_energies

    @property
    def plan(self) -> SMCPlan:
        """Ladder and tuning of this run, for another that is not to adapt."""
        self.get_samples()
        return SMCPlan(torch.tensor(self._rungs.ladder), tuple(self._rungs.tunings))

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns what was seen at each of the K rungs, ``(K,)`` each.

        ``beta``; ``ess``, the effective sample size of the weights; ``acceptance_rate`` of the
        moves; ``log_normalizer``, the rung's part of it; ``num_ancestors``, how many of the base's
        draws have descendants.
        """
        self.get_samples()
        rungs = self._rungs
        columns: dict[str, Any] = {
            "beta": rungs.ladder,
            "ess": rungs.ess,
            "acceptance_rate": rungs.acceptance_rate,
            "log_normalizer": rungs.log_normalizer,
            "num_ancestors": rungs.num_ancestors,
        }
        return {name: torch.tensor(values) for name, values in columns.items()}


def next_rung(old: float, energy: Tensor, wanted_ess: float) -> float:
    """Returns how far beta may rise so that the weights keep an effective sample size.

    Args:
        old: Beta now.
        energy: Energies of the particles, ``(N,)``.
        wanted_ess: The effective sample size.

    Example:
        >>> next_rung(0.0, torch.zeros(10), 9.0)
        1.0
    """

    def keeps(new: float) -> bool:
        return float(effective_sample_size(-(new - old) * energy)) >= wanted_ess

    if keeps(1.0):
        return 1.0
    low, high = old, 1.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return high if low == old else low


def systematic(log_weights: Tensor) -> Tensor:
    """Returns indices ``(N,)`` drawn by weight, with one random number for all of them.

    Each index occurs the whole number below or above N times its weight.

    Example:
        >>> systematic(torch.tensor([0.0, 0.0, -torch.inf, 0.0])).unique()
        tensor([0, 1, 3])
    """
    total = log_weights.double().softmax(0).cumsum(0)
    places = torch.arange(len(total), dtype=total.dtype, device=total.device)
    places = (places + torch.rand((), dtype=total.dtype, device=total.device)) / len(total)
    return torch.searchsorted(total / total[-1], places).clamp_max(len(total) - 1)


def _followed(kernel: Kernel, tuning: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """The tuning with a step size that follows the acceptance rate."""
    if not kernel.adapt_step_size:
        return tuning
    step_size = tuning["step_size"]
    change = torch.exp(step_size.new_tensor(rate - kernel.target_accept_prob))
    return {**tuning, "step_size": (change * step_size).clamp_max(kernel.largest_step_size)}
