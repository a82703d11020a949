r"""Auxiliary draws from a pool that was simulated once, by their weights.

Sweeps that start at the data take long to forget them where a model is near a phase transition.
With S draws :math:`y_s` from the law at one natural parameter :math:`\eta_0`, the anchor, one with
the chance

.. math:: w_s \propto e^{(\eta - \eta_0) \cdot T(y_s)}

is about a draw from the law at :math:`\eta`, whose error falls with the effective size of the
weights; sweeps at :math:`\eta` carry it further towards that law. At a bridge, y is drawn anew:
what is independent of where it comes from is as reversible as a move can be, so that K bridges
divide the variance of the log ratio by K + 1 even where sweeps hardly move y.

The pool is shared by all proposals: its error, about :math:`1 / \sqrt{S}` standard deviations of
the posterior where the pool is from within it, is one of the whole run, and no diagnostic of the
chains shows it. Runs with pools of their own do.

References:
    Liang, Jin, Song, Liu, An adaptive exchange algorithm for sampling from distributions with
    intractable normalizing constants, Journal of the American Statistical Association 111, 2016
    (auxiliary draws resampled by importance; theirs keep growing, from several anchors).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.mcmc.auxiliary import Auxiliary
from pyro_ebm.ops.arguments import whole

__all__ = ["Resampled"]


class Resampled(Auxiliary):
    """Draws from a pool by importance, moved on by sweeps.

    Args:
        pool: Draws at the anchor, ``(S,) + event``; independent ones, as of many chains.
        anchor: Natural parameters that they were drawn at, ``(p,)``.
        num_sweeps: Sweeps after that; the more, the less the pool matters. With none, which is much
            the fastest, its size says how exact the posterior is.

    Raises:
        ValueError: If the anchor is not a vector, or there are fewer than two draws.

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

    def __init__(self, pool: Tensor, anchor: Tensor, *, num_sweeps: int = 1) -> None:
        if anchor.dim() != 1 or len(pool) < 2:
            raise ValueError(
                "Resampled needs an anchor of shape (p,) and a pool of at least two draws, got "
                f"shapes {tuple(anchor.shape)} and {tuple(pool.shape)}: draw many at one parameter"
            )
        self.pool, self.anchor = pool, anchor
        self.num_sweeps = whole("num_sweeps", num_sweeps, least=0)
        self._statistics: Tensor | None = None

    def draw(self, family: ExponentialFamily, observed: Tensor) -> Tensor:
        """Returns draws of the pool, moved on; the data are of no account."""
        return self._drawn(family)

    def bridge(self, family: ExponentialFamily, y: Tensor) -> Tensor:
        """Returns other draws of the pool, moved on at these parameters."""
        return self._drawn(family)

    @torch.no_grad()
    def _drawn(self, family: ExponentialFamily) -> Tensor:
        if self._statistics is None:
            self._statistics = family.statistics(self.pool)
        away = family.natural() - self.anchor
        weights = (away @ self._statistics.to(away.dtype).T).softmax(-1)
        drawn = torch.multinomial(weights.flatten(0, -2), 1).view(weights.shape[:-1])
        y = self.pool[drawn]
        return family.sweep(y, self.num_sweeps) if self.num_sweeps else y
