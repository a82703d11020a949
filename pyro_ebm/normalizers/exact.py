r"""Log Z by summing over all states of a finite support.

.. math:: \log Z = \log \sum_x e^{-U(x)}

with :math:`U = E - \log\mathrm{base}`. The sum is done in chunks, and differentiable in whatever
the energy and the base depend on: a chunk is evaluated again for the backward pass, so that memory
does not grow with the number of states.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.normalizers.laws import check_dims, law_of, parameters_behind
from pyro_ebm.ops.constraints import plain, site_values
from pyro_ebm.ops.initial_points import like_of
from pyro_ebm.ops.log_normalizer import LogNormalizer

CHUNK = 2**16


def exact(dist: EnergyDistribution, *, max_states: int = 2**24) -> LogNormalizer:
    """Returns log Z without an error: in closed form, or as a sum over all states.

    ``dist.with_log_normalizer(exact(dist))`` is a normalized distribution in whose parameters HMC
    and SVI may infer: the sum keeps its graph.

    Args:
        dist: A distribution whose energy knows log Z, or whose support is finite.
        max_states: States that are summed at most.

    Returns:
        ``LogNormalizer`` in nats of the distribution's batch shape, with standard error 0.

    Raises:
        NotImplementedError: If the support is not finite and log Z not known.
        ValueError: If there are more states, or the energy depends on values whose dims are not
            those of the distribution's batch.

    Example:
        >>> from pyro_ebm.ops.constraints import spins
        >>> law = EnergyDistribution(lambda x: -x.sum(-1), support=spins, event_shape=(3,))
        >>> print(exact(law))  # doctest: +ELLIPSIS
        log Z = 3.3807... nats (sum over 8 states)
    """
    law = law_of(dist)
    if law.is_exact_energy:
        value, method = law.energy_function.log_normalizer(), "closed form"  # type: ignore[attr-defined]
    else:
        states = States.of(law, max_states)
        check_dims(law, states[torch.zeros(1, dtype=torch.long)])
        value, method = log_sum(law, states), f"sum over {states.number} states"
    parameters = parameters_behind(law, value)
    return LogNormalizer(value, torch.zeros_like(value.detach()), method, parameters=parameters)


class States:
    """The states of a finite support, by their number in mixed radix.

    Args:
        values: What one site can be, ``(K,)`` or one-hot ``(K, K)``.
        event_shape: The shape of one event.
        like: A tensor of the dtype and device of states.
    """

    def __init__(self, values: Tensor, event_shape: torch.Size, like: Tensor) -> None:
        self.values = values.to(like)
        self.event_shape = event_shape
        sites = event_shape[:-1] if values.dim() == 2 else event_shape
        self.num_sites = sites.numel()
        self.number = len(values) ** self.num_sites

    @classmethod
    def finite(cls, law: EnergyDistribution) -> States | None:
        """Returns the states of a law's support, ``None`` if they are not finitely many."""
        values = site_values(law.support, law.event_shape)
        if values is None:
            return None
        return cls(values, law.event_shape, like_of(law.energy_function))

    @classmethod
    def of(cls, law: EnergyDistribution, max_states: int) -> States:
        """Returns the states of a law's support.

        Raises:
            NotImplementedError: If it is not finite.
            ValueError: If there are more than ``max_states``.
        """
        states = cls.finite(law)
        if states is None:
            raise NotImplementedError(
                f"exact sums over finite supports, and {law!r} lives on {plain(law.support)}: use "
                "quadrature in up to three real dimensions, else an estimate (smc, bridge, ...)"
            )
        if states.number > max_states:
            raise ValueError(
                f"{law!r} has {len(states.values)}^{states.num_sites} states, more than "
                f"max_states = {max_states}: raise it, or estimate log Z"
            )
        return states

    def draw(self, number: int) -> Tensor:
        """Returns states that are equally likely, ``(number,) + event_shape``."""
        sites = (number, self.num_sites)
        which = torch.randint(len(self.values), sites, device=self.values.device)
        return self.values[which].reshape((number, *self.event_shape))

    def chunk(self, start: int) -> Tensor:
        """Returns at most a chunk of states from one number on, ``(n,) + event_shape``."""
        return self[torch.arange(start, min(start + CHUNK, self.number))]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Returns the states of these numbers, ``(n,) + event_shape``."""
        radix = len(self.values) ** torch.arange(self.num_sites)
        digits = (index[:, None] // radix) % len(self.values)
        return self.values[digits.to(self.values.device)].reshape((-1,) + self.event_shape)


def log_sum(law: EnergyDistribution, states: States) -> Tensor:
    """Returns log Z in nats of every element of a batch, ``batch_shape``, as a sum over states."""

    def part(start: int) -> Tensor:
        x = states.chunk(start)
        return torch.logsumexp(-law.potential(x.reshape(_rows(law, x))), 0)

    if states.number <= CHUNK:
        return part(0)
    starts = range(0, states.number, CHUNK)
    parts = [checkpoint(part, start, use_reentrant=False) for start in starts]
    return torch.logsumexp(torch.stack(parts), 0)


class StatisticsTable:
    r"""The distinct statistics of all states of a family, and how many states have each.

    .. math:: \log Z(\eta) = \log \sum_t n_t\, e^{\eta \cdot t}

    They do not move with the parameters, so that log Z at other ones takes no more energies.

    Args:
        statistics: One by state, ``(n, p)``.
    """

    def __init__(self, statistics: Tensor) -> None:
        self.statistics, counts = statistics.unique(dim=0, return_counts=True)
        self.log_counts = counts.to(statistics).log()

    @classmethod
    @torch.no_grad()
    def of(cls, law: EnergyDistribution, states: States) -> StatisticsTable | None:
        """Returns that of a law, ``None`` if it has more in it than statistics all rows share."""
        family = law.energy_function
        if not isinstance(family, ExponentialFamily) or law.base is not None:
            return None
        if type(family).forward is not ExponentialFamily.forward:
            return None
        chunks = (states.chunk(start) for start in range(0, states.number, CHUNK))
        found = torch.cat([family.statistics(x.reshape(_rows(law, x))) for x in chunks])
        return cls(found.flatten(0, -2)) if found.shape[1:-1].numel() == 1 else None

    def log_sum(self, natural: Tensor) -> Tensor:
        """Returns log Z in nats at natural parameters ``batch + (p,)``, shaped ``batch``."""
        exponents = natural.to(self.statistics) @ self.statistics.mT + self.log_counts
        return torch.logsumexp(exponents, -1)


def _rows(law: EnergyDistribution, x: Tensor) -> torch.Size:
    """States on a first dim of their own, beside the batch."""
    return x.shape[:1] + torch.Size((1,) * len(law.batch_shape)) + law.event_shape
