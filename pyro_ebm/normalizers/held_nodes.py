"""What a sum over nodes that are held may be taken for.

Nodes hold for some parameters and not for others, so that every such log Z comes with its error.
Looked at by itself it keeps its value, with a remark where the error is large. In a model nobody
reads remarks, and parameters move to where a wrong log Z is most wrong: there it is NaN instead,
with its slope, which kernels reject. The same holds for a function that a law asks for its log Z,
which it calls under a handler as a model does, and wherever values cannot be looked at, under
``vmap`` and while a graph is recorded.
"""

from __future__ import annotations

import math
from functools import partial

from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyro_ebm.normalizers.beyond import Beyond
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.watch import Watch

MAX_DIM = 3
"""Dims of a grid of nodes."""

MAX_ERROR = 1e-3
"""Nats of error above which a sum is no log Z: a hundred rows see it a hundred times, a tenth of a
nat, which moves a posterior by about a tenth of its standard deviation at most."""

MAX_SUM = 0.1
"""The same tenth of a nat for the sum over all rows of a model, above which it warns."""


class HeldNodes:
    """Makes estimates of sums over nodes that do not depend on parameters.

    Args:
        method: Name of the rule.
        where: Of what its nodes do not hold for log Z was asked.
        remedy: What to do there.

    Example:
        >>> import torch
        >>> nodes = HeldNodes("rule", "of a narrow law", "use more")
        >>> print(nodes.log_normalizer(torch.tensor(0.5), torch.tensor(0.2), ()))
        log Z = 0.50 ± 0.20 nats (rule); not to be trusted: its nodes err by 0.2 nats: use more
    """

    def __init__(self, method: str, where: str, remedy: str) -> None:
        self.method, self.remedy = method, remedy
        self._served = Watch(MAX_SUM, self._sentence)
        self.beyond = Beyond(where, f"A posterior that reaches there is cut off: {remedy}")

    def log_normalizer(
        self, value: Tensor, error: Tensor, parameters: tuple[Tensor, ...]
    ) -> LogNormalizer:
        """Returns a sum with its error, NaN in a model where that is above :data:`MAX_ERROR`.

        Args:
            value: The sum, log Z in nats, of the batch shape.
            error: About how far it may be off, of that shape, without a graph.
            parameters: What it depends on.
        """
        held = error <= MAX_ERROR
        try:
            holds, is_looked_at = bool(held.all()), not am_i_wrapped()
        except RuntimeError:  # vmap, or a graph under way
            holds, is_looked_at = True, False
        if not is_looked_at:
            value = self.beyond.told(value, held)
        return LogNormalizer(
            value,
            error,
            self.method,
            remarks=() if holds else self._remarks(value, error),
            parameters=parameters,
            serve=partial(self._serve, error),
        )

    def _serve(self, error: Tensor, rows: Tensor) -> None:
        self._served.take(rows * error.max())

    def _sentence(self, off: float) -> str:
        return (
            f"log Z by {self.method} errs by up to {off:.2g} nats in the sum over all rows of a "
            f"law, as the change from fewer nodes tells: {self.remedy}"
        )

    def _remarks(self, value: Tensor, error: Tensor) -> tuple[str, ...]:
        if bool((value == -math.inf).any()):
            return (f"there is no mass at its nodes: {self.remedy}",)
        return (f"its nodes err by {float(error.max()):.2g} nats: {self.remedy}",)
