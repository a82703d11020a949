"""Distributions of Pyro that ``vmap`` cannot follow, scored in a way that it can.

``Multinomial.log_prob`` writes into its logits at places that depend on the data, which ``vmap``
refuses: its chains would run one after another. The same number comes from ``where``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyro.distributions import Multinomial
from pyro.poutine.messenger import Messenger
from torch import Tensor


class VmapSafe(Messenger):
    """Replaces such distributions at sample sites.

    Example:
        >>> import pyro
        >>> with VmapSafe():
        ...     x = pyro.sample("x", Multinomial(2, torch.ones(3)), obs=torch.tensor([2.0, 0, 0]))
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if type(msg["fn"]) is Multinomial:
            msg["fn"] = copy.copy(msg["fn"])
            msg["fn"].__class__ = _Multinomial


class _Multinomial(Multinomial):
    """Scores without writing."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, value = torch.broadcast_tensors(self.logits, value)
        powers = torch.where(value == 0, 0.0, value * logits)
        ways = torch.lgamma(value.sum(-1) + 1.0) - torch.lgamma(value + 1.0).sum(-1)
        return ways + powers.sum(-1)
