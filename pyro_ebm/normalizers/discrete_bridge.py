r"""What a bridge between a discrete law and a proposal needs: log ratios at draws of both.

On finitely many states the proposal takes all sites for independent, each with the frequencies of
its values in one half of the draws,

.. math:: q(x) = \prod_i \frac{n_i(x_i) + 1/2}{n + K/2},

so that no state is left out; where no site leans to a side this is the uniform law. On infinitely
many states the base is the proposal. What sites have to do with each other is left to the bridge,
whose effective sample size falls as they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.layers import unvalidated
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.normalizers.exact import States
from pyro_ebm.normalizers.laws import check_inside
from pyro_ebm.ops.constraints import plain
from pyro_ebm.ops.nan_energies import NaNCount

MIN_DRAWS = 8


@dataclass(frozen=True)
class SiteProduct:
    """Independent sites.

    Args:
        states: What a site can be.
        log_probs: Log probabilities of the values, ``(sites, K)``.
    """

    states: States
    log_probs: Tensor

    @classmethod
    def fitted(cls, states: States, x: Tensor) -> SiteProduct:
        """Returns the frequencies of values, ``(N,) + event_shape``, half a draw added to each.

        Example:
            >>> states = States(torch.tensor([0.0, 1.0]), torch.Size([2]), torch.zeros(()))
            >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
            >>> SiteProduct.fitted(states, x).log_probs.exp()
            tensor([[0.1250, 0.8750],
                    [0.6250, 0.3750]], dtype=torch.float64)
        """
        counts = indicators(states, x).sum(0) + 0.5
        return cls(states, (counts / counts.sum(1, keepdim=True)).log())

    def sample(self, number: int) -> Tensor:
        """Returns draws, ``(number,) + event_shape``."""
        which = torch.multinomial(self.log_probs.exp(), number, replacement=True).T
        return self.states.values[which].reshape((number, *self.states.event_shape))

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log q in nats in double precision, ``(N,)``."""
        return (indicators(self.states, x) * self.log_probs).sum((1, 2))


def indicators(states: States, x: Tensor) -> Tensor:
    """Returns which value each site has, ``(N, sites, K)`` of zeros and ones.

    Raises:
        ValueError: If a site has none of them.
    """
    rows, values = len(x), states.values
    if values.dim() == 2:
        found = x.reshape(rows, states.num_sites, len(values)).double()
    else:
        found = (x.reshape(rows, states.num_sites, 1) == values.to(x)).double()
    if not bool((((found == 0) | (found == 1)).all(-1) & (found.sum(-1) == 1)).all()):
        raise ValueError("some draws are no states of the law's support: leave them out")
    return found


def log_ratios(law: EnergyDistribution, draws: Tensor, seen: NaNCount) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`-U - \log q` at the other half of the draws and at draws of the proposal.

    Args:
        law: A discrete law of ``batch_shape == ()``.
        draws: Draws of it, ``(chains, draws) + event_shape``.
        seen: Counts energies that are NaN.

    Returns:
        ``(chains, kept)`` and ``(N,)``, in double precision.

    Raises:
        NotImplementedError: If there are infinitely many states, and no base.
        ValueError: If the draws are too few, of another shape, or not of the support.
        NonFiniteEnergyError: If the energy is not finite at a draw.
    """
    half = _checked(law, draws).shape[1] // 2
    fitted, kept = draws[:, :half].flatten(0, 1), draws[:, half:]
    states = States.finite(law)
    with torch.no_grad():
        if states is None:
            at_draws, at_noise = _against_base(law, kept.flatten(0, 1), seen)
        else:
            q = SiteProduct.fitted(states, fitted)
            at_draws, at_noise = _against_sites(law, kept.flatten(0, 1), q, seen)
    if not bool(at_draws.isfinite().all()):
        raise NonFiniteEnergyError(f"{law!r}: the energy is not finite at a draw of the law")
    return at_draws.reshape(kept.shape[:2]), at_noise


def _against_sites(
    law: EnergyDistribution, x: Tensor, q: SiteProduct, seen: NaNCount
) -> list[Tensor]:
    potential, noise = unvalidated(law).potential, q.sample(len(x)).to(x)
    return [-seen(potential(at).double()) - q.log_prob(at) for at in (x, noise)]


def _against_base(law: EnergyDistribution, x: Tensor, seen: NaNCount) -> list[Tensor]:
    """The log density of the base cancels."""
    if law.base is None:
        raise NotImplementedError(
            f"bridge sampling of infinitely many states ({plain(law.support)}) needs draws of a "
            f"base, and {law!r} has none: give base="
        )
    energy, noise = unvalidated(law).energy, law.base.sample(torch.Size((len(x),)))
    return [-seen(energy(at).double()) for at in (x, noise)]


def _checked(law: EnergyDistribution, draws: Tensor) -> Tensor:
    if draws.dim() < 2 or draws.shape[2:] != law.event_shape:
        raise ValueError(
            f"draws must be (chains, draws) + {tuple(law.event_shape)}, got {tuple(draws.shape)}"
        )
    if draws.shape[1] < 2 or draws.shape[:2].numel() < MIN_DRAWS:
        raise ValueError(
            f"draws of shape {tuple(draws.shape[:2])} are too few: half of each chain makes the "
            f"proposal, so give two or more of each, and {MIN_DRAWS} together"
        )
    return check_inside(law, draws)
