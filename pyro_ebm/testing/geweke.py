r"""Geweke's joint test: parameters and data moved in turn must keep their joint law.

Chains start at exact draws :math:`(\theta, x)` of the model and alternate a step of the kernel for
:math:`\theta \mid x` with a fresh :math:`x \mid \theta`. Both keep the joint law, so that at every
step the marginal of :math:`\theta` is the prior; a kernel that is off by a little lets it drift,
and the drift adds up. Neither a posterior nor convergence is needed.

Every quantity is replaced by its share u among independent draws of the model, which bounds it and
makes heavy tails harmless. Two moments are compared, :math:`\mathbb E\, u = 1/2` and
:math:`\mathbb E (u - 1/2)^2 = 1/12`; chains are independent, and the error comes from the spread
of their own means.

Reference:
    Geweke, Getting it right: joint distribution tests of posterior simulators, Journal of the
    American Statistical Association 99, 2004.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.kernels.kernel import Kernel
from pyro_ebm.mcmc.runs.driver import MCMC
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.each_chain import EachChain
from pyro_ebm.mcmc.targets.model_target import ModelTarget
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.detection import detectable
from pyro_ebm.testing.simulation_based_calibration import KernelOf
from pyro_ebm.testing.simulator import OfOne, Simulator, evaluated, scalars
from pyro_ebm.testing.statistics import MIN_MOVED, THRESHOLD

_SHIFT = 0.5 / math.sqrt(math.pi)  # of the mean of u, per sd of a Gaussian
_WIDTH = 0.25 / (math.pi * math.sqrt(0.75))  # of the mean of (u - 1/2)^2, per share of its sd


class Moments(NamedTuple):
    """How far a quantity's two moments are from those of the model's own draws.

    Args:
        location: Z-score of the mean of u; positive if the chains lie too high.
        spread: Z-score of the mean of (u - 1/2)^2; positive if they lie too far out.
        location_stderr: Standard error of the first mean.
        spread_stderr: Of the second.
    """

    location: float
    spread: float
    location_stderr: float
    spread_stderr: float

    @property
    def worst(self) -> float:
        """The larger of the two z-scores, without sign; infinite if one is not a number."""
        return max(abs(z) if z == z else math.inf for z in self[:2])

    def __str__(self) -> str:
        """Says both, and what could have been seen."""
        seen = detectable(THRESHOLD)
        shift, width = seen * self.location_stderr / _SHIFT, seen * self.spread_stderr / _WIDTH
        return (
            f"location z {self.location:.2f}, spread z {self.spread:.2f} (with probability 0.9 a "
            f"drift of {shift:.2g} prior sd is seen, or of {width:.2g} in the sd)"
        )


@dataclass(frozen=True)
class GewekeResult:
    """Z-scores of the marginals.

    Args:
        moments: Quantity to its two z-scores.
        num_chains: Independent chains.
        num_steps: Steps of every chain.
        share_moved: Of the steps, those that moved the parameters.
        kernel: The kernel's name.
    """

    moments: dict[str, Moments]
    num_chains: int
    num_steps: int
    share_moved: float
    kernel: str

    def check(self, threshold: float = THRESHOLD) -> None:
        """Asserts that the model's law was kept.

        Args:
            threshold: Standard errors that a moment may be off.

        Raises:
            AssertionError: If one is further off, or hardly a chain has moved.
        """
        bad = [f"{n}: {m}" for n, m in self.moments.items() if not m.worst < threshold]
        if bad:
            head = f"{self.kernel} does not keep the joint law of parameters and data"
            raise AssertionError("\n".join([head, *bad]))
        if self.share_moved < MIN_MOVED:
            raise AssertionError(
                f"{self.kernel} moved in {self.share_moved:.1%} of its steps: nothing was tested, "
                "use a smaller step size"
            )

    def __str__(self) -> str:
        """Says all z-scores, and what could have been seen."""
        head = (
            f"{self.kernel}: {self.num_chains} chains of {self.num_steps} steps, "
            f"{self.share_moved:.0%} of them moves"
        )
        return "\n".join([head, *(f"{name}: {m}" for name, m in self.moments.items())])


def geweke_test(
    model: Callable[[], Any],
    sites: Sequence[str],
    kernel: KernelOf = HMC,
    *,
    num_chains: int = 200,
    num_steps: int = 1000,
    warmup_steps: int = 100,
    num_prior_draws: int = 10_000,
    quantities: Mapping[str, OfOne] | None = None,
) -> GewekeResult:
    """Alternates a kernel's steps with new data, and compares parameters with their prior.

    All chains move at once. The kernel is tuned on other data sets first.

    Args:
        model: A Pyro model without arguments; its data sites are drawn, not observed. EBM sites
            must be drawn exactly.
        sites: Names of the data sites; all others are parameters, but for discrete latents, which
            kernels sum out, and which are drawn anew with the data.
        kernel: Makes the kernel from a model.
        num_chains: Independent chains; the z-scores come from the spread of their means.
        num_steps: Steps of every chain.
        warmup_steps: Steps that tune the kernel.
        num_prior_draws: Independent draws of the model to compare with.
        quantities: Name to a scalar function of one draw of the parameters and its data, both by
            site; it is vectorized by ``vmap``.

    Returns:
        The z-scores, and what could have been seen.

    Raises:
        ValueError: If the model cannot be simulated exactly.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(m, 1.0))
        >>> _ = torch.manual_seed(0)
        >>> geweke_test(model, ["x"], num_steps=20, num_prior_draws=1000).check()
    """
    whole("num_steps", num_steps, least=1)
    simulator = Simulator(model, sites)
    each = EachChain(model, simulator.joint(whole("num_chains", num_chains, least=2))[1])
    made = kernel(each)
    tuning = _tuned(made, num_chains, warmup_steps)
    against = _Comparison(simulator, dict(quantities or {}), num_prior_draws)
    moved = _alternate(simulator, each, made, tuning, lambda *at: against.add(*at), num_steps)
    return GewekeResult(against.moments(), num_chains, num_steps, moved, type(made).__name__)


def _tuned(kernel: Kernel, num_chains: int, warmup_steps: int) -> dict[str, Tensor]:
    """What a warm-up on these data has tuned."""
    mcmc = MCMC(kernel, 1, warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run()
    assert mcmc.state is not None
    return mcmc.state.tuning


def _alternate(
    simulator: Simulator,
    each: EachChain,
    kernel: Kernel,
    tuning: dict[str, Tensor],
    look: Callable[[Values, Values], None],
    num_steps: int,
) -> float:
    """Runs the chains from exact draws; returns the share of steps that moved."""
    parameters, data = simulator.joint(each.num_chains)
    each.update(data)
    target = kernel.bind()
    assert isinstance(target, ModelTarget)
    potential = CapturedPotential(target)
    state = replace(kernel.init(potential, target.position_of(parameters)), tuning=tuning)
    moves = 0.0
    for _ in range(num_steps):
        new, _ = kernel.step(potential, state)
        moves += float((new.position != state.position).any(1).double().mean())
        parameters = target.constrain(new.position)
        data = simulator.data(parameters)
        each.update(data)
        state = kernel.refreshed(potential, new)
        look(parameters, data)
    return moves / num_steps


class _Comparison:
    """Sums of a chain's moments, relative to independent draws of the model."""

    def __init__(self, simulator: Simulator, asked: Mapping[str, OfOne], num: int) -> None:
        self._asked = asked
        drawn = self._quantities(*simulator.joint(whole("num_prior_draws", num, least=100)))
        self._prior = {name: value.sort().values for name, value in drawn.items()}
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def _quantities(self, parameters: Values, data: Values) -> Values:
        extra = {name: evaluated(fn, parameters, data) for name, fn in self._asked.items()}
        return {**scalars(parameters), **extra}

    def add(self, parameters: Values, data: Values) -> None:
        for name, value in self._quantities(parameters, data).items():
            u = _share_below(value, self._prior[name])
            both = torch.stack([u, (u - 0.5).square()])
            self._sums[name] = self._sums[name] + both if name in self._sums else both
        self._count += 1

    def moments(self) -> dict[str, Moments]:
        return {name: self._of(name, sums / self._count) for name, sums in self._sums.items()}

    def _of(self, name: str, means: Tensor) -> Moments:
        """From chain means ``(2, C)``; the prior's draws have an error of their own."""
        prior = self._prior[name]
        own = (_share_below(prior, prior) - 0.5).square().mean() + 1.0 / (6.0 * len(prior))
        wanted = torch.stack([torch.full_like(own, 0.5), own])
        noise = means.new_tensor([1.0 / 12.0, 1.0 / 180.0]) / len(prior)
        stderr = (means.var(1) / means.shape[1] + noise).sqrt()
        z = (means.mean(1) - wanted) / stderr
        return Moments(*z.tolist(), *stderr.tolist())


def _share_below(value: Tensor, prior: Tensor) -> Tensor:
    """The share of the sorted draws that lie below, ties by half."""
    sides = [torch.searchsorted(prior, value.contiguous(), right=right) for right in (False, True)]
    return (sides[0] + sides[1]).double() / (2.0 * len(prior))
