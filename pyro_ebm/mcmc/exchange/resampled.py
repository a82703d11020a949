r"""Auxiliary draws from a pool that was simulated once, by their weights.

Sweeps that start at the data take long to forget them where a model is near a phase transition.
With S draws :math:`y_s` from the law at one natural parameter :math:`\eta_0`, the anchor, one with
the chance

.. math:: w_s \propto e^{(\eta - \eta_0) \cdot T(y_s)}

is about a draw from the law at :math:`\eta`, whose error falls with the effective size of the
weights; sweeps at :math:`\eta` carry it further towards that law. At a bridge, y is drawn anew:
what is independent of where it comes from is as reversible as a move can be, so that K bridges
divide the variance of the log ratio by K + 1 even where sweeps hardly move y.

The pool is shared by all proposals and by all n rows of a site: its error, about :math:`\sqrt{n /
S}` standard deviations of the posterior where the pool is from within it, is one of the whole run,
and no diagnostic of the chains shows it. Runs with pools of their own do. For a tenth of a standard
deviation it takes S = 100 n draws.

**Where the pool does not reach.** Far from the anchor a few draws have all the weight. Where their
effective number :math:`1 / \sum_s w_s^2` is under 2, one draw outweighs all others together: y is
then a constant and the ratio says nothing of Z, so that chains would drift off. Such proposals are
rejected, unless they lead back. The posterior is cut off there, and a run says so if it touches
that bound. No draw of a pool lies much beyond :math:`\sqrt{2 \ln S}` of its standard deviations; Z
is told wrongly from about there on, while the bound comes later.

References:
    Liang, Jin, Song, Liu, An adaptive exchange algorithm for sampling from distributions with
    intractable normalizing constants, Journal of the American Statistical Association 111, 2016
    (auxiliary draws resampled by importance; theirs keep growing, from several anchors).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.mcmc.exchange.auxiliary import Auxiliary
from pyro_ebm.ops.arguments import whole

__all__ = ["Resampled"]


class Resampled(Auxiliary):
    """Draws of one site from a pool by importance, moved on by sweeps.

    Args:
        pool: Draws at the anchor, ``(S,) + event``; independent ones, as of many chains, and many
            more than the site has rows.
        anchor: Natural parameters that they were drawn at, ``(p,)``.
        num_sweeps: Sweeps after that; the more, the less the pool matters. With none, which is much
            the fastest, its size says how exact the posterior is.

    Raises:
        ValueError: If the anchor is not a vector, or there are fewer than two draws; when run, if
            the model has several sites.

    Example:
        >>> from pyro_ebm.energies import ExponentialRandomGraph
        >>> from pyro_ebm.energies.graph_statistics import Edges, Triangles
        >>> anchor, terms = torch.tensor([-1.0, 0.5]), [Edges(), Triangles()]
        >>> pool = ExponentialRandomGraph(anchor, 5, terms).sample((100,))
        >>> proposed = ExponentialRandomGraph(anchor + 0.1 * torch.eye(2), 5, terms)
        >>> Resampled(pool, anchor, num_sweeps=2).draw(proposed, pool[0]).shape
        torch.Size([2, 10])
    """

    is_exact = False
    origin = "a pool"
    bias = "its auxiliary draws are of one pool, whose error is in all of them"

    def __init__(self, pool: Tensor, anchor: Tensor, *, num_sweeps: int = 1) -> None:
        if anchor.dim() != 1 or len(pool) < 2:
            raise ValueError(
                "Resampled needs an anchor of shape (p,) and a pool of at least two draws, got "
                f"shapes {tuple(anchor.shape)} and {tuple(pool.shape)}: draw many at one parameter"
            )
        self.pool, self.anchor = pool, anchor
        self.num_sweeps = whole("num_sweeps", num_sweeps, least=0)
        self.moves_by_sweeps = self.num_sweeps > 0
        self._statistics: Tensor | None = None

    def bound(self, families: Mapping[str, ExponentialFamily]) -> Resampled:
        """Returns one that knows the pool's statistics in this family.

        Raises:
            ValueError: If there are several sites.
        """
        if len(families) != 1:
            raise ValueError(
                "Resampled has draws of one EBM site, and the model has several without log Z: "
                f"{sorted(families)}. Use Sweeps, or one plate for sites of one family"
            )
        new = copy(self)
        (family,) = families.values()
        new._statistics = family.statistics(self.pool).detach()
        return new

    def draw(self, family: ExponentialFamily, observed: Tensor) -> Tensor:
        """Returns draws of the pool, moved on; the data are of no account."""
        return self._drawn(family)

    def bridge(self, family: ExponentialFamily, y: Tensor) -> Tensor:
        """Returns other draws of the pool, moved on at these parameters."""
        return self._drawn(family)

    def effective_draws(self, family: ExponentialFamily) -> Tensor:
        """Returns the effective size of the weights at these parameters, ``(C,) + B``."""
        return 1.0 / self._weights(family).square().sum(-1)

    @torch.no_grad()
    def _weights(self, family: ExponentialFamily) -> Tensor:
        """The chance of every draw of the pool, ``(C,) + B + (S,)``."""
        statistics = family.statistics(self.pool) if self._statistics is None else self._statistics
        away = family.natural() - self.anchor
        return (away @ statistics.to(away.dtype).T).softmax(-1)

    @torch.no_grad()
    def _drawn(self, family: ExponentialFamily) -> Tensor:
        weights = self._weights(family)
        drawn = torch.multinomial(weights.flatten(0, -2), 1).view(weights.shape[:-1])
        y = self.pool[drawn]
        return family.sweep(y, self.num_sweeps) if self.num_sweeps else y
