r"""From a law that can be drawn to a discrete one, by sweeps at inverse temperatures between them.

.. math:: f_\beta = f_0\, e^{-\beta E}, \qquad 0 \le \beta \le 1,

where :math:`f_0` is the base, or else the counting measure on finitely many states, whose mass is
their number: all of them are equally likely there. What is estimated along the way is
:math:`\log (Z / Z_0)`, and :math:`\log Z_0` is 0 of a base and :math:`\log|\mathcal X|` of the
counting measure.

Particles move by sweeps that keep :math:`f_\beta`: an :class:`~pyro_ebm.energies.ExponentialFamily`
without a base by its own, where it has them; other laws by Gibbs sweeps over coordinates with few
values and by Metropolis walks over other integers. These ask for the energy of every value of every
coordinate: a sweep takes as many calls as there are coordinates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.layers import unvalidated
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.normalizers.exact import States
from pyro_ebm.ops.constraints import base_measure, plain
from pyro_ebm.ops.nan_energies import NaNCount
from pyro_ebm.ops.short_blocks import blocks_of


def is_discrete(law: EnergyDistribution) -> bool:
    """Whether a law lives on integers, or on vectors that stand for some.

    Example:
        >>> from pyro_ebm.ops.constraints import spins
        >>> is_discrete(EnergyDistribution(lambda x: -x, support=spins, event_shape=()))
        True
    """
    return base_measure(law.support) == "counting"


class DiscretePath:
    """The laws between a start that can be drawn and a discrete law.

    Args:
        law: A discrete law of ``batch_shape == ()`` with a base, or with finitely many states.

    Attributes:
        seen: The energies that were NaN on the way.

    Raises:
        ValueError: If it has neither.

    Example:
        >>> from pyro_ebm.ops.constraints import spins
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: -9 * x.sum(-1), support=spins, event_shape=(3,))
        >>> path = DiscretePath(law)
        >>> path.move(path.draw(2), beta=1.0, num_sweeps=1)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
        >>> round(path.log_mass, 4)  # the log of 8 states
        2.0794
    """

    def __init__(self, law: EnergyDistribution) -> None:
        self.law = unvalidated(law)
        self.states = States.finite(law) if law.base is None else None
        if law.base is None and self.states is None:
            raise ValueError(
                f"{law!r} has infinitely many states on {plain(law.support)}, so that no law on "
                "them is uniform: give base= to start from"
            )
        self.seen = NaNCount()
        self._family = _with_sweeps(law)
        self._blocks = blocks_of(law.support, law.event_shape)

    @property
    def start(self) -> str:
        """What the particles are drawn from."""
        return "base" if self.states is None else "uniform law"

    @property
    def log_mass(self) -> float:
        """Log of the start's own mass in nats."""
        return 0.0 if self.states is None else math.log(self.states.number)

    @torch.no_grad()
    def draw(self, number: int) -> Tensor:
        """Returns draws of the start, ``(number,) + event_shape``."""
        if self.states is not None:
            return self.states.draw(number)
        drawn: Tensor = self.law.base.sample(torch.Size((number,)))
        return drawn

    @torch.no_grad()
    def energy(self, x: Tensor) -> Tensor:
        """Returns E in nats in double precision, ``(N,)``; infinite for NaN.

        Raises:
            NonFiniteEnergyError: If one is minus infinity, or none is finite.
        """
        energy = self.seen(self.law.energy(x).double())
        if bool((energy == -torch.inf).any()):
            raise NonFiniteEnergyError(f"{self.law!r}: the energy is minus infinity at a state")
        if not bool(energy.isfinite().any()):
            raise NonFiniteEnergyError(f"{self.law!r}: none of {len(x)} states has finite energy")
        return energy

    @torch.no_grad()
    def move(self, x: Tensor, beta: float, num_sweeps: int, *, adapt: bool = False) -> Tensor:
        """Returns states after sweeps that keep the law at an inverse temperature.

        Args:
            x: States, ``(N,) + event_shape``.
            beta: The inverse temperature.
            num_sweeps: Sweeps.
            adapt: Whether walks are tuned, which is for pilots: the law is not kept meanwhile.
        """
        if self._family is not None:
            natural = self._family.natural().detach()
            heated = (beta * natural.double()).to(natural.dtype).expand(len(x), -1)
            return self._family.with_natural(heated).sweep(x, num_sweeps)
        for _ in range(num_sweeps):
            for block in self._blocks:
                potential = block.conditional(lambda x: self._potential(x, beta), x)
                point = block.kernel.start(potential, block.take(x))
                point, _ = block.kernel.step(potential, point, adapt=adapt)
                x = block.put(x, block.kernel.events(point))
        return x

    def freeze(self) -> None:
        """Holds the tuning of walks from now on."""
        for block in self._blocks:
            block.kernel.freeze()

    def _potential(self, x: Tensor, beta: float) -> Tensor:
        heated = beta * self.law.energy(x)
        return heated if self.law.base is None else heated - self.law.base.log_prob(x)


def energies_at_rungs(
    path: DiscretePath, ladder: Tensor, num_chains: int, num_samples: int, burn_in: int
) -> Tensor:
    """Returns energies of chains that are carried up a ladder, ``(K + 1, chains, draws)``.

    Draws of the first rung are fresh ones of the start.

    Args:
        path: The laws between start and end.
        ladder: Inverse temperatures after the start, rising to 1, ``(K,)``.
        num_chains: Independent chains.
        num_samples: Draws of each at a rung, one a sweep.
        burn_in: Sweeps before them.
    """
    fresh = path.energy(path.draw(num_chains * num_samples))
    rungs, x = [fresh.reshape(num_chains, num_samples)], path.draw(num_chains)
    for beta in ladder.tolist():
        x, rows = path.move(x, beta, burn_in), []
        for _ in range(num_samples):
            x = path.move(x, beta, 1)
            rows.append(path.energy(x))
        rungs.append(torch.stack(rows, -1))
    return torch.stack(rungs)


def draws_of_chains(
    path: DiscretePath, *, num_chains: int = 64, num_samples: int = 100, burn_in: int = 100
) -> Tensor:
    """Returns draws of chains at the end of a path, ``(chains, draws) + event_shape``, one a sweep.

    Args:
        path: The laws between start and end; chains begin at draws of its start.
        num_chains: Chains.
        num_samples: Draws of each.
        burn_in: Sweeps before them, in which walks over integers are tuned.
    """
    x = path.move(path.draw(num_chains), 1.0, burn_in, adapt=True)
    path.freeze()
    rows = []
    for _ in range(num_samples):
        x = path.move(x, 1.0, 1)
        rows.append(x)
    return torch.stack(rows, 1)


def _with_sweeps(law: EnergyDistribution) -> ExponentialFamily | None:
    """The law's energy if it is a family that moves by itself."""
    energy = law.energy_function
    if isinstance(energy, ExponentialFamily) and law.energy_sweeps:
        return energy
    return None
