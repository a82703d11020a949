r"""What all forms of exchange share: acceptance by auxiliary draws in the place of log Z.

However :math:`\theta'` is proposed, by a move that is as likely as its reverse it is accepted by

.. math::
    \log\alpha = U(\theta) - U(\theta') + \log \widehat{\frac{Z(\theta)}{Z(\theta')}}

with the potential U that leaves log Z out; the last term is what data sets :math:`y \sim
p_{\theta'}` say of it, and exponentials of it have the right mean
(:mod:`pyro_ebm.mcmc.exchange.exchange`). As the ratio has noise of its own, it is no function of
the two points, and there is no proposal density to compare it with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.mcmc.exchange.auxiliary import Auxiliary, ExactDraws, Sweeps
from pyro_ebm.mcmc.exchange.exchange_target import ExchangeTarget, exchange_target
from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.metropolis import accept
from pyro_ebm.mcmc.kernels.random_walk import BEST_ACCEPT_PROB, FIRST_STEP_SIZE
from pyro_ebm.mcmc.kernels.tuned_kernel import TunedKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.ops.arguments import whole

MIN_DRAWS = 2.0
"""Effective draws of a pool below which one outweighs all others, and says nothing of log Z."""

UNJUDGED = "; exchange_diagnostics has not been asked whether that shows"
"""What inexact chains say of themselves until it has."""

MAX_BEYOND = 0.01
"""The share of proposals beyond a pool's reach that is not worth a word."""


class ExchangeKernel(TunedKernel):
    """Base of kernels that accept by auxiliary draws.

    A subclass moves: it defines :meth:`step`, out of :meth:`at`, :meth:`log_accept` and
    :meth:`decided`.

    Args:
        model: As for :class:`~pyro_ebm.mcmc.Exchange`.
        auxiliary: Likewise.
        num_bridges: Likewise.
        **options: Those of :class:`~pyro_ebm.mcmc.kernels.tuned_kernel.TunedKernel`.

    Raises:
        TypeError: When run, if an energy is not an exponential family.
    """

    needs_gradient = False
    couples_chains = False  # whether chains move by where others are
    first_step_size = FIRST_STEP_SIZE
    best_accept_prob = BEST_ACCEPT_PROB

    def __init__(
        self,
        model: Any = None,
        *,
        auxiliary: Auxiliary | None = None,
        num_bridges: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.auxiliary = auxiliary
        self.num_bridges = whole("num_bridges", num_bridges, least=0)
        self.adjusted = auxiliary is None or auxiliary.is_exact

    # --- the target

    def bind(self, *args: Any, initial_params: Any = None, **kwargs: Any) -> ExchangeTarget:
        """Returns the model as a target without its missing log Z's.

        Raises:
            TypeError: If an energy is not an exponential family, or has a base.
        """
        target = exchange_target(self.given, args, kwargs, initial_params=initial_params)
        families = target.families()
        if families is None:
            others = [type(e).__name__ for e in target.energies.values()]
            raise TypeError(
                "Exchange needs energies that are exponential families without a base, got "
                f"{', '.join(others)}: derive the energy from ExponentialFamily"
            )
        self._drawn_by = (self.auxiliary or best_for(target)).bound(families)
        bridged = self.num_bridges > 0 and type(self._drawn_by).bridge is Auxiliary.bridge
        check_drawable(
            target,
            exactly=isinstance(self._drawn_by, ExactDraws),
            by_sweeps=self._drawn_by.moves_by_sweeps or bridged,
        )
        self.adjusted = self._drawn_by.is_exact
        self.bias = self._drawn_by.bias + ("" if self.adjusted else UNJUDGED)
        return target

    def init(self, potential: CapturedPotential, q: Tensor) -> State:
        """Returns the first state, with the natural parameters there."""
        state = super().init(potential, q)
        return replace(state, extra=target_of(potential).naturals(q))

    def refreshed(self, potential: CapturedPotential, state: State) -> State:
        """Returns the state with U and the natural parameters of this target."""
        naturals = target_of(potential).naturals(state.position)
        same = all(torch.equal(naturals[name], state.extra[name]) for name in naturals)
        fresh = super().refreshed(potential, state)
        return fresh if same else replace(fresh, extra=naturals)

    def at(self, potential: CapturedPotential, state: State, q: Tensor) -> State:
        """Returns the state with other positions, with U and the natural parameters there."""
        naturals = target_of(potential).naturals(q)
        return replace(state, position=q, potential=potential.value(q), extra=naturals)

    # --- acceptance

    def decided(self, potential: CapturedPotential, state: State, to: State) -> tuple[State, Info]:
        """Returns the state with the chains moved that accept, and what diagnostics need."""
        moved, accept_prob = accept(state, to, self.log_accept(potential, state, to))
        lost = ~torch.isfinite(to.potential)
        reach = self.reach(target_of(potential), to.extra)
        return moved, {"acceptance_rate": accept_prob, "non_finite": lost, **reach}

    def log_accept(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns U - U' and what the auxiliary draws say of Z / Z', ``(C,)``."""
        target, ratio = target_of(potential), state.potential - to.potential
        for name in target.energies:
            terms = self.log_ratios(target, name, state.extra, to.extra)
            ratio = ratio + terms.reshape(len(terms), -1).sum(1)
        return ratio

    def log_ratios(self, target: ExchangeTarget, name: str, old: Values, new: Values) -> Tensor:
        """Returns what auxiliary draws say of log Z - log Z' for every element of a site.

        Args:
            target: The model.
            name: The site.
            old: Natural parameters of all sites, ``(C,) + B + (p,)``.
            new: Those proposed.

        Returns:
            Shape ``(C,) + B``, weighted as the site; exponentials have the mean Z / Z'. -inf where
            auxiliary draws of a pool do not reach.
        """
        step = (old[name] - new[name]) / (self.num_bridges + 1)
        if not bool(step.any()):
            return step.sum(-1)
        template = target.energies[name]
        y = self._drawn_by.draw(template.with_natural(new[name]), target.observed[name])
        total = (step * template.statistics(y)).sum(-1)
        for k in range(1, self.num_bridges + 1):
            y = self._drawn_by.bridge(template.with_natural(new[name] + k * step), y)
            total = total + (step * template.statistics(y)).sum(-1)
        beyond = self._leads_beyond(template, old[name], new[name])
        return target.weighted(name, torch.where(beyond, -torch.inf, total))

    # --- the reach of a pool

    def _leads_beyond(self, template: ExponentialFamily, old: Tensor, new: Tensor) -> Tensor:
        """Whether a jump leads to where too few draws of a pool count, and to fewer, ``(C,) + B``.

        A chain that starts there may come back.
        """
        draws = self._drawn_by.effective_draws(template.with_natural(new))
        if draws is None or not bool((draws < MIN_DRAWS).any()):
            return torch.zeros(new.shape[:-1], dtype=torch.bool, device=new.device)
        before = self._drawn_by.effective_draws(template.with_natural(old))
        assert before is not None
        return (draws < MIN_DRAWS) & (draws < before)

    def reach(self, target: ExchangeTarget, naturals: Values) -> Info:
        """Returns how many draws of a pool stand behind those for proposals; empty without a pool.

        Args:
            target: The model.
            naturals: Natural parameters of all sites at the proposals, ``(C,) + B + (p,)``.

        Returns:
            ``effective_draws``, the least of each chain's elements that count, ``(C,)``.
        """
        found = []
        for name, template in target.energies.items():
            draws = self._drawn_by.effective_draws(template.with_natural(naturals[name]))
            if draws is not None:
                counted = torch.where(target.weights[name] != 0, draws, torch.inf)
                found.append(counted.reshape(len(counted), -1).amin(1))
        return {"effective_draws": torch.stack(found).amin(0)} if found else {}

    def doubts(self, stats: Mapping[str, Tensor]) -> list[str]:
        """Returns a sentence if the posterior is cut off where a pool ends."""
        if "effective_draws" not in stats:
            return []
        beyond = float((stats["effective_draws"] < MIN_DRAWS).double().mean())
        if beyond <= MAX_BEYOND:
            return []
        return [
            f"{beyond:.0%} of the proposals lie beyond the pool of auxiliary draws, where one of "
            "them outweighs all others, and were rejected: the posterior is cut off there. Give a "
            "pool drawn nearer to the posterior, or of more draws, start chains near its anchor "
            "(initial_params=), or use Sweeps"
        ]


def target_of(potential: CapturedPotential) -> ExchangeTarget:
    """Returns what is sampled, with the natural parameters of its sites."""
    target = potential.target
    assert isinstance(target, ExchangeTarget)
    return target


def best_for(target: ExchangeTarget, num_sweeps: int = 20) -> Auxiliary:
    """Returns how auxiliary draws are best made: exactly where all energies can, else by sweeps."""
    return ExactDraws() if target.draws_are_exact else Sweeps(num_sweeps)


def check_drawable(target: ExchangeTarget, *, exactly: bool, by_sweeps: bool) -> None:
    """Raises where auxiliary draws would be those of another law.

    Args:
        target: The model.
        exactly: Whether they come from the energies' exact samplers.
        by_sweeps: Whether the energies' kernels move them.

    Raises:
        TypeError: If they are not of the sites' laws.
    """
    swept = target.without_sweeps if by_sweeps else []
    drawn = target.without_samples if exactly else []
    if not (swept or drawn):
        return
    method, name = ("sweep()", swept[0]) if swept else ("sample()", drawn[0])
    instead = "" if swept or name in target.without_sweeps else "use auxiliary=Sweeps(), or "
    raise TypeError(
        f"EBM site {name!r}: {method} of its energy does not draw from its law. It is missing, or "
        "that of another law: of another support than the distribution's, or inherited by a class "
        f"that changes the energy: {instead}define it beside what it draws from, give an "
        "auxiliary= that knows the law, or use posterior(..., method='generalized')"
    )
