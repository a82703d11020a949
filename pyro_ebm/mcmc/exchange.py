r"""Exchange: exact inference of :math:`\theta` where :math:`Z(\theta)` is out of reach.

A proposal :math:`\theta'` comes with a data set :math:`y \sim p_{\theta'}` of the same size as x,
and is accepted by

.. math::
    \log\alpha = \log\frac{\pi(\theta')}{\pi(\theta)}
        + \sum_i [E_\theta(x_i) - E_{\theta'}(x_i)] + \sum_i [E_{\theta'}(y_i) - E_\theta(y_i)],

in which every Z cancels. With exact y this is exact at any number of chains and draws. Bridging
carries y from :math:`\theta'` towards :math:`\theta` by reversible moves at K parameters between
them, and makes the last sum less noisy: acceptance rises towards that of Metropolis–Hastings with Z
known.

References:
    Murray, Ghahramani, MacKay, MCMC for doubly-intractable distributions, UAI 2006, arXiv:1206.6848
    (bridging: section 5); Møller, Pettitt, Reeves, Berthelsen, An efficient Markov chain Monte
    Carlo method for distributions with intractable normalising constants, Biometrika 93, 2006.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.auxiliary import Auxiliary, ExactDraws, Sweeps
from pyro_ebm.mcmc.captured import CapturedPotential
from pyro_ebm.mcmc.exchange_target import ExchangeTarget, exchange_target
from pyro_ebm.mcmc.kernel import State
from pyro_ebm.mcmc.random_walk import RandomWalk
from pyro_ebm.mcmc.target import Target, Values
from pyro_ebm.ops.arguments import whole


class Exchange(RandomWalk):
    """Exchange by a random walk, many chains in one batch.

    Args:
        model: A Pyro model with observed EBM sites whose log Z is missing. Their energies are
            :class:`~pyro_ebm.energies.ExponentialFamily`; they may stand in plates, with parameters
            of their own for every group.
        auxiliary: How y is drawn; by the energy's exact sampler if it has one, else by sweeps that
            start at the data, which marks the chains as inexact.
        num_bridges: K, parameters between the two at which y is moved.
        **options: Those of :class:`RandomWalk`.

    Raises:
        TypeError: When run, if an energy is not an exponential family.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.energies import Ising
        >>> def model(image):
        ...     coupling = pyro.sample("coupling", dist.Uniform(0.0, 1.0))
        ...     field = pyro.sample("field", dist.Normal(0.0, 1.0))
        ...     law = EnergyDistribution(Ising(coupling, (12, 40), field=field, periodic=False))
        ...     pyro.sample("image", law, obs=image)
        >>> Exchange(model).adjusted
        True
    """

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

    def bind(self, *args: Any, initial_params: Any = None, **kwargs: Any) -> Target:
        """Returns the model as a target without its missing log Z's."""
        target = exchange_target(self.given, args, kwargs)
        families = target.families()
        if families is None:
            others = [type(e).__name__ for e in target.energies.values()]
            raise TypeError(
                "Exchange needs energies that are exponential families without a base, got "
                f"{', '.join(others)}: derive the energy from ExponentialFamily"
            )
        self._drawn_by = self.auxiliary or best_for(target)
        self.adjusted = self._drawn_by.is_exact
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

    def propose(self, potential: CapturedPotential, state: State) -> State:
        """Returns a jump of every chain, with its natural parameters."""
        to = super().propose(potential, state)
        return replace(to, extra=target_of(potential).naturals(to.position))

    def log_accept(self, potential: CapturedPotential, state: State, to: State) -> Tensor:
        """Returns U - U' and what the auxiliary draws say of Z / Z'."""
        target, ratio = target_of(potential), super().log_accept(potential, state, to)
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
            Shape ``(C,) + B``, weighted as the site; exponentials have the mean Z / Z'.
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
        return total * target.weights[name]


def target_of(potential: CapturedPotential) -> ExchangeTarget:
    """Returns what is sampled, with the natural parameters of its sites."""
    target = potential.target
    assert isinstance(target, ExchangeTarget)
    return target


def best_for(target: ExchangeTarget, num_sweeps: int = 20) -> Auxiliary:
    """Returns how auxiliary draws are best made: exactly where all energies can, else by sweeps."""
    return ExactDraws() if target.draws_are_exact else Sweeps(num_sweeps)
