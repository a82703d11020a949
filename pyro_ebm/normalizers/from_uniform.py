r"""Log Z of a discrete exponential family by annealing from the uniform law.

At natural parameters 0 all states of a finite support are equally likely, and Z is their number.
With :math:`\eta_k = \beta_k \eta` and the family's own reversible sweeps in between,

.. math:: \log w = \sum_{k=0}^{K-1} (\beta_{k+1} - \beta_k)\, \eta \cdot T(x_k), \qquad
    \log \hat Z = \log |\mathcal X| + \log \operatorname{mean} w,

which is annealed importance sampling: :math:`\hat Z` is unbiased, its logarithm low on average.
What the chains do not reach on the way from high temperature is missing from it. From draws of the
law the same way is gone back; with exact ones the result is high on average, and both together are
Bennett's estimate (:mod:`~pyro_ebm.normalizers.ais`).

Reference:
    Neal, Annealed importance sampling, Statistics and Computing 11, 2001.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.normalizers.annealed import annealed
from pyro_ebm.normalizers.exact import States
from pyro_ebm.normalizers.laws import check_draws, single
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.log_normalizer import LogNormalizer


def from_uniform(
    dist: EnergyDistribution,
    *,
    num_steps: int = 200,
    num_chains: int = 400,
    num_sweeps: int = 1,
    draws: Tensor | None = None,
    draws_are_exact: bool = False,
) -> LogNormalizer:
    """Estimates log Z of a family on a finite support, such as a lattice or a random graph.

    Args:
        dist: A distribution whose energy is an ``ExponentialFamily`` with a kernel of its own,
            without a base, of ``batch_shape == ()``.
        num_steps: K, temperatures from the uniform law to this one.
        num_chains: Independent chains.
        num_sweeps: Sweeps at each temperature.
        draws: Draws of the law, ``(N,) + event_shape``, to go back from.
        draws_are_exact: Whether these are independent draws of the law itself: draws of chains give
            no bound.

    Returns:
        ``LogNormalizer`` in nats; ``lower`` is the estimate forward, ``upper`` is there with exact
        draws.

    Raises:
        TypeError: If the energy is no such family.
        NotImplementedError: If the support is not finite.

    Example:
        >>> from pyro_ebm.energies import Ising
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(Ising(0.2, (6, 6), field=0.1))
        >>> print(from_uniform(law, num_steps=20, num_chains=200))  # doctest: +ELLIPSIS
        log Z = ... nats (ais, from the uniform law, ESS ...)
    """
    law = single(dist, "annealing from the uniform law")
    ladder = _Ladder.of(law, num_steps, num_sweeps)
    forward = ladder.up(ladder.uniform(whole("num_chains", num_chains, least=2)))
    backward = None if draws is None else ladder.down(check_draws(law, draws))
    exact = draws_are_exact
    found = annealed(forward, backward, start="uniform law", law=law, exact=exact)
    return _shifted(found, ladder.log_number)


class _Ladder(NamedTuple):
    """Temperatures between the uniform law on some states and a family."""

    family: ExponentialFamily
    states: States
    beta: Tensor
    num_sweeps: int

    @classmethod
    def of(cls, law: EnergyDistribution, num_steps: int, num_sweeps: int) -> _Ladder:
        family, states = _family_of(law), States.finite(law)
        if states is None:
            raise NotImplementedError(
                f"{law!r} has infinitely many states, so that no law on them is uniform: use a base"
            )
        beta = torch.linspace(0.0, 1.0, whole("num_steps", num_steps, least=1) + 1)
        return cls(family, states, beta.double(), whole("num_sweeps", num_sweeps, least=1))

    @property
    def log_number(self) -> float:
        return self.states.num_sites * math.log(len(self.states.values))

    def uniform(self, number: int) -> Tensor:
        """States drawn with the same chance each, ``(number,) + event_shape``."""
        values = self.states.values
        which = torch.randint(len(values), (number, self.states.num_sites), device=values.device)
        return values[which].reshape((number, *self.states.event_shape))

    def up(self, x: Tensor) -> Tensor:
        """Log weights from the uniform law to the family, ``(C,)``."""
        log_weights = self._score(x) * self.beta[1]
        for k in range(1, len(self.beta) - 1):
            x = self._at(k, len(x)).sweep(x, self.num_sweeps)
            log_weights = log_weights + self._score(x) * (self.beta[k + 1] - self.beta[k])
        return log_weights

    def down(self, x: Tensor) -> Tensor:
        """Log weights from the family to the uniform law, ``(C,)``."""
        log_weights = -self._score(x) * (self.beta[-1] - self.beta[-2])
        for k in range(len(self.beta) - 2, 0, -1):
            x = self._at(k, len(x)).sweep(x, self.num_sweeps)
            log_weights = log_weights - self._score(x) * (self.beta[k] - self.beta[k - 1])
        return log_weights

    def _score(self, x: Tensor) -> Tensor:
        statistics = self.family.statistics(x).double()
        return (statistics * self.family.natural().detach()).sum(-1)

    def _at(self, k: int, number: int) -> ExponentialFamily:
        natural = self.family.natural().detach()
        heated = (self.beta[k] * natural.double()).to(natural.dtype)
        return self.family.with_natural(heated.expand(number, -1))


def _shifted(found: LogNormalizer, log_number: float) -> LogNormalizer:
    lower = None if found.lower is None else found.lower + log_number
    upper = None if found.upper is None else found.upper + log_number
    return replace(found, value=found.value + log_number, lower=lower, upper=upper)


def _family_of(law: EnergyDistribution) -> ExponentialFamily:
    family = law.energy_function
    if not isinstance(family, ExponentialFamily) or not law.energy_sweeps:
        raise TypeError(
            "annealing from the uniform law moves by the sweeps of an ExponentialFamily without a "
            f"base, on the family's own support, got {law!r}: on the reals with a base use ais"
        )
    return family
