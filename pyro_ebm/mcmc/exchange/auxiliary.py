r"""Auxiliary draws for exchange: whole data sets :math:`y \sim p_{\theta'}` of every chain's own.

Exact draws make exchange exact. Where the energy has no exact sampler, y is what some sweeps of a
kernel that keeps :math:`p_{\theta'}` make of the data (double Metropolis–Hastings): the posterior
is then too wide by an amount that falls with the number of sweeps and that nothing in the chain
shows.

Reference:
    Liang, A double Metropolis–Hastings sampler for spatial models with intractable normalizing
    constants, Journal of Statistical Computation and Simulation 80, 2010.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.coupling_from_the_past import at_most

PATIENCE = 2**12
"""Sweeps of an exact sampler by coupling from the past, which every jump of a chain waits for."""


class Auxiliary(ABC):
    """How the auxiliary draws of an exponential family are made."""

    is_exact: bool
    moves_by_sweeps = False  # of the energy's own kernel
    origin = "the data"  # where sweeps start
    bias = "its auxiliary draws are not exact"  # of draws that are not, in words

    def bound(self, families: Mapping[str, ExponentialFamily]) -> Auxiliary:
        """Returns what draws for the sites of a model, whatever was drawn before.

        Args:
            families: Their energies by name.

        Raises:
            ValueError: If it cannot draw for these.
        """
        return self

    @abstractmethod
    def draw(self, family: ExponentialFamily, observed: Tensor) -> Tensor:
        """Returns a value of the site for every chain.

        Args:
            family: The energy at the proposed parameters, ``batch_shape == (C,) + B``.
            observed: The data, ``B + event``.

        Returns:
            Shape ``(C,) + B + event``.
        """

    def bridge(self, family: ExponentialFamily, y: Tensor) -> Tensor:
        """Returns y after a reversible move at the parameters of a bridge: a sweep.

        Args:
            family: The energy there, ``batch_shape == (C,) + B``.
            y: The draws so far, ``(C,) + B + event``.
        """
        return family.sweep(y, 1)

    def effective_draws(self, family: ExponentialFamily) -> Tensor | None:
        """Returns how many draws of a pool stand behind one, ``(C,) + B``; ``None`` without a pool.

        Args:
            family: The energy at some parameters, ``batch_shape == (C,) + B``.
        """
        return None


class ExactDraws(Auxiliary):
    """Draws by the energy's own exact sampler."""

    is_exact = True

    def draw(self, family: ExponentialFamily, observed: Tensor) -> Tensor:
        """Returns exact draws.

        Raises:
            ValueError: If the energy's ``sample`` gives them another shape.
            NotCoupledError: If it is by coupling from the past, and takes too long.
        """
        with at_most(PATIENCE):
            return shaped(family.sample(), family, "sample()")


class Sweeps(Auxiliary):
    """Sweeps of the energy's own kernel, started at the data.

    Args:
        num_sweeps: Sweeps; double them until the posterior's spread no longer moves.
    """

    is_exact = False
    moves_by_sweeps = True
    bias = "its auxiliary draws are sweeps from the data, and too wide by what they remember of it"

    def __init__(self, num_sweeps: int = 20) -> None:
        self.num_sweeps = whole("num_sweeps", num_sweeps, least=1)

    def draw(self, family: ExponentialFamily, observed: Tensor) -> Tensor:
        """Returns where the sweeps have led."""
        start = observed.expand(family.batch_shape + family.event_shape)
        return shaped(family.sweep(start, self.num_sweeps), family, "sweep()")


def shaped(y: Tensor, family: ExponentialFamily, method: str) -> Tensor:
    """Returns draws, once there is one for each element of the family's batch.

    Raises:
        ValueError: If they would be broadcast: rows that share a draw are no data set.
    """
    shape = family.batch_shape + family.event_shape
    if y.shape != shape:
        raise ValueError(
            f"{method} of {type(family).__name__} returned shape {tuple(y.shape)}, expected "
            f"batch_shape + event_shape = {tuple(shape)}: a draw of its own for every row and chain"
        )
    return y
