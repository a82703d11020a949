r"""Continuous sites of few dims, scored with log Z as an integral over fixed nodes.

.. math:: \log p_\theta(x) = -U_\theta(x) - \log \sum_k w_k\, e^{-U_\theta(x_k)}

by the trapezoidal rule on a box (:mod:`~pyro_ebm.normalizers.quadrature`), or by Gauss–Hermite
nodes of a Gaussian base (:mod:`~pyro_ebm.normalizers.gauss_hermite`). The nodes do not move with
:math:`\theta`, so that log Z is a smooth function of it. They hold for some :math:`\theta` and not
for others: every value comes with an error, infinite where data lie in mass that the nodes miss
(:mod:`pyro_ebm.infer.bayes.witnesses`), and where it is too large the density is taken to be
:math:`e^{-10^4}` times what it says, so that no chain stays there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.gaussian_base import GaussianBase
from pyro_ebm.distributions.layers import unvalidated
from pyro_ebm.infer.bayes.enumerated import Enumerated
from pyro_ebm.infer.bayes.witnesses import Cells, OnCoordinates, unseen
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.normalizers.gauss_hermite import gauss_hermite, on_base, rule
from pyro_ebm.normalizers.laws import shared_law
from pyro_ebm.normalizers.quadrature import Box, on_box
from pyro_ebm.poutine.surrogate import SiteScorer

MAX_ERROR = 1e-2  # nats of a log likelihood, over all rows
BEYOND = 1e4  # nats: log Z is raised by them where its error is too large


class Rule(Protocol):
    """A rule for log Z of a site."""

    def __call__(self, law: EnergyDistribution) -> tuple[Tensor, Tensor]:
        """Returns log Z in nats and its error, both broadcasting with the batch shape."""

    @property
    def num_nodes(self) -> int:
        """How many energies it takes for one law."""


@dataclass(frozen=True)
class OnBox:
    """The trapezoidal rule on a box.

    Args:
        box: The box; its dtype is that of values of the site.
        is_shared: Whether all rows have one law, so that the nodes are evaluated once.
        data: Data to be seen by the nodes (:mod:`pyro_ebm.infer.bayes.witnesses`), ``(K,) + rows +
            event_shape``; rows are ones where the law is shared.
    """

    box: Box
    is_shared: bool
    data: Tensor | None = None

    def __call__(self, law: EnergyDistribution) -> tuple[Tensor, Tensor]:
        """Returns log Z in nats and its error, infinite if data lie in mass that it misses."""
        law = shared_law(law, self.box.low) if self.is_shared else law
        value, error = on_box(law, self.box)
        if self.data is None:
            return value, error
        log_density = OnCoordinates(law)
        u = log_density.space.to_unconstrained(self.data)
        lost = unseen(log_density, u, Cells.of_box(self.box, u), value)
        return value, torch.where(lost.any(0), torch.inf, error)

    @property
    def num_nodes(self) -> int:
        """Nodes of the box."""
        return int(self.box.num_nodes ** len(self.box.low))

    def __str__(self) -> str:
        return f"{self.num_nodes} nodes"


@dataclass(frozen=True)
class OnBase:
    """Gauss–Hermite nodes of a site's Gaussian base.

    Args:
        dim: Dims of the site.
        is_shared: Whether all rows have one law.
        num_per_dim: Nodes in each dim.
        data: Data to be seen by the nodes, ``(K,) + rows + event_shape``, of dims that the base has
            as well.
    """

    dim: int
    is_shared: bool
    num_per_dim: int = 32
    data: Tensor | None = None

    def __call__(self, law: EnergyDistribution) -> tuple[Tensor, Tensor]:
        """Returns log Z in nats and its error, infinite if data lie in mass that it misses."""
        if self.is_shared:
            value, error = on_base(law, self.num_per_dim)
        else:
            found = gauss_hermite(law, num_nodes=self.num_per_dim)
            assert found.stderr is not None
            value, error = found.value, found.stderr
        if self.data is None:
            return value, error
        return value, torch.where(self._misses(law, self.data, value), torch.inf, error)

    def _misses(self, law: EnergyDistribution, x: Tensor, log_z: Tensor) -> Tensor:
        """Whether data lie in mass that is missed, of the rows; x in sds of the base."""
        base = GaussianBase.of(law.base)
        assert base is not None
        base = base.of_first() if self.is_shared else base
        one = shared_law(law, base.loc, with_base=False) if self.is_shared else law

        def log_density(z: Tensor) -> Tensor:
            return -unvalidated(one).energy(base.points(z)).double()

        z = base.coordinates(x)
        nodes = torch.as_tensor(rule(self.num_per_dim)[0], dtype=z.dtype, device=z.device)
        return unseen(log_density, z, Cells.of_normal(nodes, z), log_z).any(0)

    @property
    def num_nodes(self) -> int:
        """Nodes in all dims."""
        return int(self.num_per_dim**self.dim)

    def __str__(self) -> str:
        return f"{self.num_nodes} Gauss-Hermite nodes of its base"


class Integrated(SiteScorer):
    """Scores EBM sites with log Z by a rule each; for ``surrogate``, as a frozen objective.

    Args:
        rules: A rule by site; sites without one are summed over their states.
        largest_error: Nats by which log Z of a row may be off, by site.
        enumerated: What scores sites without a rule.

    Example:
        >>> low, high = torch.tensor([[-9.0], [9.0]])
        >>> rule = OnBox(Box(low, high, 41), is_shared=True)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
        >>> Integrated({"x": rule}, {"x": 1e-4}).site_log_prob("x", law, torch.tensor(0.0))
        tensor(-0.9189)
    """

    is_normalized = True

    def __init__(
        self,
        rules: Mapping[str, Rule],
        largest_error: Mapping[str, float],
        enumerated: Enumerated | None = None,
    ) -> None:
        self.rules, self.largest_error = rules, largest_error
        self._enumerated = enumerated or Enumerated()

    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **context: Any) -> Tensor:
        """Returns the log density in nats, ``sample + batch``.

        Raises:
            ValueError: If energies have dims that the distribution does not declare: nodes stand in
                front of those it does.
        """
        if p.is_normalized or name not in self.rules:
            return self._enumerated.site_log_prob(name, p, x)
        log_p = p.unnormalized_log_prob(x)
        if log_p.dim() > max(len(p.batch_shape), len(rows_of(p, x))):
            raise ValueError(
                f"EBM site {name!r} has energies of shape {tuple(log_p.shape)} and batch_shape "
                f"{tuple(p.batch_shape)}: give batch_shape= all dims of what its energy depends on"
            )
        log_z, error = self.rules[name](p)
        log_z = torch.where(error <= self.largest_error[name], log_z, log_z + BEYOND)
        return log_p - log_z.to(x.dtype)

    def holds(self, laws: Mapping[str, EnergyDistribution]) -> bool:
        """Whether the rules hold for these laws, by site."""
        errors = {name: rule(laws[name])[1] for name, rule in self.rules.items()}
        return all(bool((e <= self.largest_error[name]).all()) for name, e in errors.items())
