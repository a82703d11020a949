r"""Simulation-based calibration: does a kernel draw the posterior, for data of the model itself?

For :math:`\theta \sim \pi`, :math:`x \sim p_\theta` and L independent draws of the posterior given
x, the rank of :math:`\theta` among the draws is uniform on 0, ..., L, for every function of
:math:`\theta` and x. Every simulation is one chain of a single batch, with data of its own.

Chains start where all runs start, spread over the unconstrained space and without knowledge of
:math:`\theta`, and warm up: so a warm-up that is too short is seen as well as a wrong kernel. Draws
are thinned until they are next to independent; a pilot run finds by how much, and goes on until it
is long beside that. Ranks among
correlated draws crowd at both ends, as those of a posterior that is too narrow do.

References:
    Talts, Betancourt, Simpson, Vehtari, Gelman, Validating Bayesian inference algorithms with
    simulation-based calibration, 2018, arXiv:1804.06788; Modrák, Moon, Kim, Bürkner, Huurre,
    Faltejsková, Gelman, Vehtari, Simulation-based calibration checking for Bayesian computation:
    the choice of test quantities shapes sensitivity, Bayesian Analysis, 2023, arXiv:2211.02383.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.kernels.kernel import Kernel, State
from pyro_ebm.mcmc.runs.driver import MCMC
from pyro_ebm.mcmc.targets.each_chain import EachChain
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.ops.arguments import whole
from pyro_ebm.testing.calibration_power import Detectable, smallest_detectable
from pyro_ebm.testing.simulator import OfOne, Simulator, evaluated, scalars
from pyro_ebm.testing.uniformity import Uniformity, shape_in_words, uniformity

KernelOf = Callable[[EachChain], Kernel]
"""Makes a kernel for a model: a class such as ``HMC``, or a function that sets its options."""

LOG_LIKELIHOOD = "log likelihood"
_PILOT = 100  # steps that the thinning is first looked for in
_LONGEST_PILOT = 1600
_PILOT_LAGS = 8  # thinnings in a pilot run that is long enough to find them in
_CORRELATED = 0.05  # what two draws may be
_MIN_DRAWS = 8  # draws, to say how correlated they are
_FEW = 0.7  # of the draws, that correlation leaves


@dataclass(frozen=True)
class CalibrationResult:
    """Ranks of the truth among draws of the posterior.

    Args:
        ranks: Quantity to whole numbers from 0 to L, one per simulation.
        num_draws: L.
        thinning: Steps between two draws.
        effective_draws: To how many independent draws the L are worth, of the worst parameter.
        kernel: The kernel's name.
        has_log_likelihood: Whether it is among the quantities; not without log Z, nor where
            latents are summed out.
    """

    ranks: dict[str, Tensor]
    num_draws: int
    thinning: int
    effective_draws: float
    kernel: str
    has_log_likelihood: bool

    @property
    def num_simulations(self) -> int:
        """How many data sets were simulated."""
        return len(next(iter(self.ranks.values())))

    @cached_property
    def tests(self) -> dict[str, Uniformity]:
        """Both tests of every quantity."""
        return {name: uniformity(r, self.num_draws) for name, r in self.ranks.items()}

    @property
    def pvalues(self) -> dict[str, float]:
        """The p-value of every quantity, of both tests together."""
        return {name: test.pvalue for name, test in self.tests.items()}

    def check(self, level: float = 1e-4) -> None:
        """Asserts that the ranks are uniform.

        Args:
            level: How often a right kernel fails, all quantities together.

        Raises:
            AssertionError: If they are not; it says in which way, or that the draws of a chain are
                too correlated for the ranks to say anything.
        """
        bad = [n for n, p in self.pvalues.items() if p * len(self.ranks) < level]
        if bad:
            lines = [self._verdict(), *map(self._of, bad), *self._remarks()]
            raise AssertionError("\n".join(lines))

    def _verdict(self) -> str:
        """What ranks say that are not uniform."""
        if self._is_correlated:
            return f"{self.kernel}: inconclusive, for a right kernel's ranks are not uniform either"
        return f"{self.kernel} is not calibrated"

    def smallest_detectable(self, power: float = 0.9, level: float = 1e-4) -> Detectable:
        """Returns what errors of a Gaussian posterior :meth:`check` sees by chi-square alone.

        Args:
            power: How often.
            level: That of :meth:`check`.
        """
        each = level / (2 * len(self.ranks))  # two tests of every quantity
        return smallest_detectable(self.num_simulations, self.num_draws, each, power)

    def __str__(self) -> str:
        """Says what was done, all p-values, and what could have been seen."""
        head = (
            f"{self.kernel}: {self.num_simulations} simulations, ranks among {self.num_draws} draws"
            f" {self.thinning} steps apart (worth {self.effective_draws:.0f} independent ones)"
        )
        power = [
            f"seen with probability {p}: {self.smallest_detectable(power=p)}" for p in (0.5, 0.9)
        ]
        return "\n".join([head, *map(self._of, self.ranks), *power, *self._remarks()])

    def _of(self, name: str) -> str:
        test, shape = self.tests[name], shape_in_words(self.ranks[name], self.num_draws)
        by = f"chi-square {test.chi_square:.2g}, ECDF {test.ecdf:.2g}"
        return f"{name}: p {test.pvalue:.2g} ({by}); {shape}"

    @property
    def _is_correlated(self) -> bool:
        return self.effective_draws < _FEW * self.num_draws

    def _remarks(self) -> list[str]:
        remarks = []
        if self._is_correlated:
            remarks.append("draws of a chain are correlated, which too looks ∪: set thinning=")
        if not self.has_log_likelihood:
            why = "its log Z is not known, or latents are summed out"
            remarks.append(f"the log likelihood was not ranked: {why}")
        return remarks


def simulation_based_calibration(
    model: Callable[[], Any],
    sites: Sequence[str],
    kernel: KernelOf = HMC,
    *,
    num_simulations: int = 1000,
    num_draws: int = 63,
    warmup_steps: int = 200,
    thinning: int | None = None,
    quantities: Mapping[str, OfOne] | None = None,
) -> CalibrationResult:
    """Ranks parameters among the draws of a kernel that was given data simulated from them.

    Every scalar parameter is ranked, the log likelihood where log Z is known, and what the user
    adds. Discrete latents, which kernels sum out, are drawn with the data and not ranked. A kernel
    may be wrong in ways that leave every parameter's own ranks uniform, and be seen by quantities
    that join parameters and data.

    Args:
        model: A Pyro model without arguments; its data sites are drawn, not observed. EBM sites
            must be drawn exactly.
        sites: Names of the data sites; all others are parameters, but for discrete latents.
        kernel: Makes the kernel from a model.
        num_simulations: Data sets, and chains.
        num_draws: L, draws kept of every chain.
        warmup_steps: Of every chain.
        thinning: Steps between two draws; found by a pilot run if not given.
        quantities: Name to a scalar function of one draw of the parameters and its data, both by
            site; it is vectorized by ``vmap``.

    Returns:
        The ranks, with p-values and what could have been seen.

    Raises:
        ValueError: If the model cannot be simulated exactly.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", 5):
        ...         pyro.sample("x", dist.Normal(m, 1.0))
        >>> _ = torch.manual_seed(0)
        >>> result = simulation_based_calibration(model, ["x"], num_simulations=100)
        >>> result.check()
        >>> sorted(result.ranks)
        ['log likelihood', 'm']
    """
    whole("num_draws", num_draws, least=1)
    simulator = Simulator(model, sites)
    truth, data = simulator.joint(whole("num_simulations", num_simulations, least=2))
    if not callable(kernel):
        raise TypeError(
            f"kernel must make a kernel from a model, as Exchange or lambda m: HMC(m) does, got "
            f"an instance of {type(kernel).__name__}"
        )
    made = kernel(EachChain(model, data))
    state, thinning = _warmed_up(made, num_simulations, warmup_steps, thinning)
    mcmc = MCMC(
        made, num_draws, 0, num_chains=num_simulations, thinning=thinning, disable_progbar=True
    )
    mcmc.run(initial_state=state)
    draws = mcmc.get_samples()
    asked = dict(quantities or {})
    if simulator.knows_likelihood:
        asked[LOG_LIKELIHOOD] = simulator.log_likelihood
    return CalibrationResult(
        _ranks(truth, data, draws, asked),
        num_draws,
        thinning,
        _effective(mcmc.get_samples(unconstrained=True)),
        type(made).__name__,
        simulator.knows_likelihood,
    )


def _warmed_up(
    kernel: Kernel, num_chains: int, warmup_steps: int, thinning: int | None
) -> tuple[State, int]:
    """The chains after their warm-up, and how many steps make two draws next to independent."""
    state, draws = _pilot(kernel, num_chains, 1 if thinning else _PILOT, warmup_steps)
    if thinning:
        return state, thinning
    steps, lag = _PILOT, _lag(draws)
    while steps < min(_PILOT_LAGS * lag, _LONGEST_PILOT):
        steps *= 2
        state, draws = _pilot(kernel, num_chains, steps, 0, state)
        lag = _lag(draws)
    return state, lag


def _pilot(
    kernel: Kernel, num_chains: int, steps: int, warmup_steps: int, state: State | None = None
) -> tuple[State, Values]:
    """Where chains have come, and what they drew on their way."""
    mcmc = MCMC(kernel, steps, warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run(initial_state=state)
    assert mcmc.state is not None
    return mcmc.state, mcmc.get_samples(unconstrained=True)


def _ranks(truth: Values, data: Values, draws: Values, asked: Mapping[str, OfOne]) -> Values:
    """How many draws lie below the truth; ties are broken at random."""
    num_draws = next(iter(draws.values())).shape[1]
    at_truth = _quantities(truth, data, asked)
    less = {name: torch.zeros_like(v, dtype=torch.long) for name, v in at_truth.items()}
    same = {name: torch.zeros_like(v, dtype=torch.long) for name, v in at_truth.items()}
    for i in range(num_draws):
        drawn = _quantities({n: v[:, i] for n, v in draws.items()}, data, asked)
        for name, value in drawn.items():
            less[name] += value < at_truth[name]
            same[name] += value == at_truth[name]
    return {
        n: less[n] + (torch.rand(len(k), device=k.device) * (k + 1)).long() for n, k in same.items()
    }


def _quantities(parameters: Values, data: Values, asked: Mapping[str, OfOne]) -> Values:
    extra = {name: evaluated(fn, parameters, data) for name, fn in asked.items()}
    return {**scalars(parameters), **extra}


def _lag(draws: Values) -> int:
    """The least number of steps after which nothing is correlated by much, nor after twice it."""
    worst = _correlations(draws)
    half = len(worst) // 2
    low = (torch.maximum(worst[:half], worst[1::2][:half]) <= _CORRELATED).nonzero()
    return int(low[0]) + 1 if len(low) else len(worst)


def _effective(draws: Values) -> float:
    """To how many independent draws those of a chain are worth, as an AR(1)."""
    size = next(iter(draws.values())).shape[1]
    if size < _MIN_DRAWS:
        return float(size)
    lag_one = min(float(_correlations(draws)[0]), 1.0)
    return max(1.0, size * (1.0 - lag_one) / (1.0 + lag_one))


def _correlations(draws: Values) -> Tensor:
    """Correlations of the worst coordinate, or its square, at lags 1, 2, ..., over all chains.

    By how much draws differ at a lag, relative to long lags: chains are too short for their means.
    Squares stand for the density, which Hamiltonian kernels forget later than they do positions.
    """
    x = torch.cat([v.reshape(*v.shape[:2], -1) for v in draws.values()], 2)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    x = torch.cat([x, x.square()], 2).nan_to_num(0.0, 0.0, 0.0)  # chains that stood still
    lags = range(1, x.shape[1] // 2 + 1)
    apart = torch.stack([(x[:, k:] - x[:, :-k]).square().mean((0, 1)) for k in lags])
    return (1.0 - apart / apart[len(lags) // 2 :].mean(0)).abs().amax(1)
