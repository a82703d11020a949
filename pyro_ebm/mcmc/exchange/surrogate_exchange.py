r"""Exchange whose proposals follow a surrogate of log Z.

With any function :math:`\hat A(\eta)` in place of log Z, the surrogate potential

.. math:: \hat U(q) = U(q) + \sum_s \hat A_s(\eta_s(q))

has a gradient. A proposal is the end of a leapfrog trajectory of it, from q with a fresh momentum p
to :math:`(q', p')`. Trajectories are reversible and preserve volume whatever :math:`\hat U` is, so
that what is accepted by

.. math::
    \log\alpha = U(q) - U(q') + \tfrac12 \lVert p \rVert^2 - \tfrac12 \lVert p' \rVert^2
        + \log\widehat{\frac{Z(\theta)}{Z(\theta')}},

with the last term by auxiliary draws as in :mod:`~pyro_ebm.mcmc.exchange.exchange`, has the exact
posterior; a bad surrogate costs acceptance. Where a surrogate falls off too fast, trajectories
hardly enter the tails and hardly leave them, hence a share r of plain random-walk moves. Where the
surrogate is not finite, as outside of what anchors reach, all moves are walks; one from there to
where it is finite is accepted with a factor r, and one back with 1 / r. A share of the iterations
may be jumps along differences of chains (:mod:`~pyro_ebm.mcmc.exchange.direction_exchange`), to
which the surrogate does not matter: what mixes moves that each keep a law keeps it.

**What can be gained.** The variance of the last term is about the squared distance gone, in units
of the posterior's spread, however good the surrogate. A random walk pays it once more in U. So
a perfect surrogate gains a factor of about two per auxiliary draw in many dimensions, and more in
few, where a whole trajectory goes before acceptance falls to .234; more needs bridges.

References:
    Murray, Ghahramani, MacKay, MCMC for doubly-intractable distributions, UAI 2006,
    arXiv:1206.6848;
    Rasmussen, Gaussian processes to speed up hybrid Monte Carlo for expensive Bayesian integrals,
    Bayesian Statistics 7, 2003 (trajectories of a surrogate, accepted by the target).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.exchange.direction_exchange import (
    check_one_posterior,
    check_spanning,
    jumps_along,
    moved_by_halves,
)
from pyro_ebm.mcmc.exchange.exchange_kernel import ExchangeKernel, target_of
from pyro_ebm.mcmc.exchange.exchange_target import ExchangeTarget
from pyro_ebm.mcmc.kernels.hamiltonian import draw_momentum, leapfrog
from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.metropolis import accept
from pyro_ebm.mcmc.kernels.random_walk import walked
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.target import Target, Values
from pyro_ebm.ops.arguments import share, whole

__all__ = ["SurrogateExchange"]

LogNormalizerOf = Callable[[Tensor], Tensor]
"""Natural parameters ``(...) + (p,)`` to log Z in nats, ``(...)``, up to a constant."""

QUARTER_PERIOD = math.pi / 2  # of a trajectory in whitened units: the longest one
_JITTER = 0.2


class SurrogateExchange(ExchangeKernel):
    """Exchange by trajectories of a surrogate, mixed with random-walk moves.

    Warm-up tunes the length of trajectories to the acceptance rate, up to a quarter of a period.

    Args:
        model: As of :class:`Exchange`.
        surrogate: Log Z by natural parameters, about: a function of ``(..., p)`` to ``(...)`` that
            torch can differentiate, such as an :class:`~pyro_ebm.normalizers.Anchored`; of several
            sites, one by name. Where it is not finite, chains walk.
        num_steps: L, leapfrog steps of a trajectory; they cost no auxiliary draws.
        random_walk_share: How often a chain makes a random-walk move instead.
        direction_share: How often all chains jump along differences of each other instead; then
            their number must be at least twice D + 2 for D coordinates.
        step_size: The first leapfrog step; by default of a trajectory of half the longest.
        **options: Those of :class:`Exchange`: ``auxiliary``, ``num_bridges``,
            ``target_accept_prob`` (.234) and others.

    Raises:
        TypeError: If the surrogate is not callable, nor a mapping of callables.
        ValueError: If a share is not between 0 and 1; when run, if the surrogate is not one for
            each site, or returns another shape, or chains for directions are too few or have data
            of their own.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.energies import Ising
        >>> from pyro_ebm.mcmc import MCMC
        >>> def model(image):
        ...     coupling = pyro.sample("coupling", dist.Uniform(0.0, 0.4))
        ...     law = EnergyDistribution(Ising(coupling, (13, 40), periodic=False))
        ...     pyro.sample("image", law, obs=image)
        >>> high_temperature = lambda natural: 987 * natural[..., 0].cosh().log()  # 987 bonds
        >>> kernel = SurrogateExchange(model, surrogate=high_temperature)
        >>> mcmc = MCMC(kernel, 5, 5, num_chains=4, disable_progbar=True)
        >>> mcmc.run(Ising(0.2, (13, 40), periodic=False).sample())
        >>> mcmc.get_samples()["coupling"].shape
        torch.Size([4, 5])
    """

    def __init__(
        self,
        model: Any = None,
        *,
        surrogate: LogNormalizerOf | Mapping[str, LogNormalizerOf],
        num_steps: int = 5,
        random_walk_share: float = 0.15,
        direction_share: float = 0.0,
        step_size: float | None = None,
        **options: Any,
    ) -> None:
        self.num_steps = whole("num_steps", num_steps, least=1)
        self.largest_step_size = QUARTER_PERIOD / self.num_steps
        first = 0.5 * self.largest_step_size if step_size is None else step_size
        super().__init__(model, step_size=first, **options)
        functions = surrogate.values() if isinstance(surrogate, Mapping) else [surrogate]
        if not all(callable(function) for function in functions):
            raise TypeError(
                "surrogate must be a function of natural parameters to log Z, or one for each "
                f"site by name, got {type(surrogate).__name__}"
            )
        self.surrogate = surrogate
        self.random_walk_share = share("random_walk_share", random_walk_share)
        self.direction_share = share("direction_share", direction_share)
        self.couples_chains = self.direction_share > 0.0

    def bind(self, *args: Any, initial_params: Any = None, **kwargs: Any) -> ExchangeTarget:
        """Returns the model as a target without its missing log Z's."""
        target = super().bind(*args, initial_params=initial_params, **kwargs)
        if self.couples_chains:
            check_one_posterior(target)
        self._trajectories = CapturedPotential(SurrogateTarget(target, self.surrogate))
        return target

    def init(self, potential: CapturedPotential, q: Tensor) -> State:
        """Returns the first state, with the natural parameters there."""
        if self.couples_chains:
            check_spanning(q)
        return super().init(potential, q)

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves the chains whose proposals are accepted."""
        if self.couples_chains and float(torch.rand(())) < self.direction_share:
            return moved_by_halves(self, potential, state, self._jumps)
        to, gain = self._proposed(potential, state)
        moved, accept_prob = accept(state, to, self.log_accept(potential, state, to) + gain)
        lost, reach = ~torch.isfinite(gain), self.reach(target_of(potential), to.extra)
        return moved, {"acceptance_rate": accept_prob, "non_finite": lost, **reach}

    def _proposed(self, potential: CapturedPotential, state: State) -> tuple[State, Tensor]:
        """Where every chain may go, and the log of how much likelier the way back is, ``(C,)``.

        That is p^2/2 - p'^2/2, or the change of the share of walks; -inf of a chain that is lost,
        which stays, for there may be no auxiliary draws where it has got to.
        """
        jitter = 1.0 + _JITTER * (2.0 * float(torch.rand(())) - 1.0)
        p = draw_momentum(state)
        end, p_end = self.trajectory(state, p, jitter)
        gain = 0.5 * (p.square() - p_end.square()).sum(1)
        rate = self._walk_rate(state.position)
        walks = torch.rand_like(gain) < rate
        q = torch.where(walks[:, None], walked(state, self._length(state)), end)
        gain = torch.where(walks, torch.log(self._walk_rate(q) / rate), gain)
        gain = torch.where(gain.isnan(), -torch.inf, gain)
        q = torch.where(torch.isfinite(gain)[:, None], q, state.position)
        return self.at(potential, state, q), gain

    def _length(self, state: State) -> Tensor:
        """Of a jump: less than a trajectory's, whose log ratio varies half as much."""
        return self.num_steps * state.tuning["step_size"] / math.sqrt(2.0)

    def _jumps(self, state: State, resting: Tensor) -> Tensor:
        return jumps_along(state, resting, self._length(state))

    def trajectory(self, state: State, p: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Returns the end of every chain's trajectory, position and momentum, ``(C, D)``.

        The momentum is NaN where the surrogate is not finite at that end.

        Args:
            state: Where the chains are, with step size and metric.
            p: Whitened momenta, ``(C, D)``.
            factor: What the step size is multiplied by.
        """
        u, gradient = self._trajectories(state.position)
        start = replace(state, potential=u, gradient=gradient)
        step_size = factor * state.tuning["step_size"]
        end, p = leapfrog(self._trajectories, start, p, step_size, self.num_steps)
        held = torch.isfinite(end.potential)
        return end.position, torch.where(held[:, None], p, torch.nan)

    def _walk_rate(self, q: Tensor) -> Tensor:
        """How often a chain at q walks, ``(C,)``: always where the surrogate is not finite."""
        known = torch.isfinite(self._trajectories.value(q))
        return torch.where(known, self.random_walk_share, 1.0).to(q.dtype)


class SurrogateTarget(Target):
    """The target of an exchange with a surrogate for every log Z that is missing.

    Args:
        target: The target.
        surrogate: Log Z by natural parameters, of one site or by name.

    Raises:
        ValueError: If there is not one for each site.
    """

    def __init__(
        self, target: ExchangeTarget, surrogate: LogNormalizerOf | Mapping[str, LogNormalizerOf]
    ) -> None:
        self.target, self.dim, self.is_vectorized = target, target.dim, target.is_vectorized
        if not isinstance(surrogate, Mapping):
            surrogate = dict.fromkeys(list(target.energies)[:1], surrogate)
        if surrogate.keys() != target.energies.keys():
            raise ValueError(
                f"surrogate must have one function for each of {sorted(target.energies)}, got "
                f"{sorted(surrogate)}: pass a dict by site name"
            )
        self._functions = dict(surrogate)

    def __repr__(self) -> str:
        return repr(self.target)

    def potential(self, q: Tensor) -> Tensor:
        """Returns U with the surrogates of log Z in nats, ``(C,)``, differentiable.

        Raises:
            ValueError: If a surrogate returns another shape than that of one log Z for each set.
        """
        u = self.target.potential(q)
        for name, natural in self.target.naturals_with_graph(q).items():
            log_z = self._functions[name](natural)
            if log_z.shape != natural.shape[:-1]:
                raise ValueError(
                    f"the surrogate of site {name!r} returned shape {tuple(log_z.shape)} for "
                    f"natural parameters of shape {tuple(natural.shape)}; expected "
                    f"{tuple(natural.shape[:-1])}, without the last dim"
                )
            u = u + self.target.weighted(name, log_z.to(u.dtype)).reshape(len(q), -1).sum(1)
        return u

    def constrain(self, q: Tensor) -> Values:
        """Returns the sites' values on their supports."""
        return self.target.constrain(q)

    def split(self, q: Tensor) -> Values:
        """Returns the unconstrained values by name."""
        return self.target.split(q)

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns positions for unconstrained values by name."""
        return self.target.join(values)

    def draw_start(self, num_chains: int) -> Tensor:
        """Returns starting positions ``(C, D)``."""
        return self.target.draw_start(num_chains)
