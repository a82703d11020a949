r"""How far the error of a held log Z may displace a posterior, and the draws that takes.

Of p parameters given n observations, a log Z made of S effective draws displaces the posterior by
about :math:`\sqrt{pn / S}` of its standard deviations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.watch import Watch

MIN_SHARE = 0.05
"""The share of effective draws below which log Z is not told."""

MAX_DISPLACEMENT = 0.3
"""Posterior standard deviations by which the error of log Z may displace a mean."""


def displacement(num_parameters: int, num_observations: int, size: Tensor) -> Tensor:
    r"""Returns :math:`\sqrt{pn / S}`, of the shape of ``size``.

    Args:
        num_parameters: p.
        num_observations: n, how often Z enters the likelihood.
        size: S, effective numbers of draws.

    Example:
        >>> displacement(2, 50, torch.tensor(400.0))
        tensor(0.5000)
    """
    number = whole("num_observations", num_observations, least=1)
    number *= whole("num_parameters", num_parameters, least=1)
    return torch.sqrt(number / size)


def draws_wanted(num_parameters: int, num_observations: int) -> float:
    """Returns the effective draws that displace by :data:`MAX_DISPLACEMENT`."""
    return num_parameters * num_observations / MAX_DISPLACEMENT**2


def times_as_many(off: float) -> float:
    """Returns by how many times there are too few draws, at a displacement of ``off``."""
    return (off / MAX_DISPLACEMENT) ** 2


def refuse(off: float, what: str, instead: str = "") -> None:
    """Raises where a displacement is too large.

    Args:
        off: The displacement.
        what: The draws, as the sentence begins.
        instead: What else may be done, as the sentence ends.

    Raises:
        ValueError: If ``off`` is beyond :data:`MAX_DISPLACEMENT`.
    """
    if off > MAX_DISPLACEMENT:
        raise ValueError(
            f"{what} displace the posterior by about {off:.2g} of its standard deviations: use "
            f"{math.ceil(times_as_many(off))} times as many{instead}"
        )


class RowsServed:
    r"""Warns where a log Z made of draws serves more rows than its draws allow for.

    Attributes:
        size: S where log Z was last told, of the batch shape.

    Args:
        draws: What S counts.
        num_parameters: p; 1 where it is not known, which is the least that may be.

    Example:
        >>> served = RowsServed("effective draws", 2)
        >>> served.size = torch.tensor(1000.0)
        >>> served.told(torch.tensor(20))  # sqrt(40 / 1000) = 0.2
    """

    def __init__(self, draws: str, num_parameters: int = 1) -> None:
        self.draws, self.num_parameters = draws, num_parameters
        self.size: Tensor | None = None
        self._watch = Watch(MAX_DISPLACEMENT, self._sentence)

    def told(self, rows: Tensor) -> None:
        """Takes for how many rows log Z is subtracted.

        Args:
            rows: n, those of the first law of the batch, 0-d.
        """
        if self.size is not None:
            self._watch.take(torch.sqrt(self.num_parameters * rows / self.size.flatten()[0]))

    def _sentence(self, off: float) -> str:
        return (
            f"the {self.draws} displace the posterior of so many rows by about {off:.2g} of its "
            f"standard deviations (the rule sqrt(p n / S) with p = "
            f"{self.num_parameters}): use {math.ceil(times_as_many(off))} times as "
            "many draws, mcmc.Exchange, or tell the error by mcse_logz"
        )
