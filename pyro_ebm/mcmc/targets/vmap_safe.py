"""What of Pyro ``vmap`` and bijections cannot follow, said in a way that they can.

``Multinomial.log_prob`` writes into its logits at places that depend on the data, and the logarithm
of hidden Markov models and enumerated sites is a function with a backward pass of its own: ``vmap``
refuses both, and chains would run one after another. The support of a ``MixtureSameFamily`` has no
bijection, though that of its components has one. And a distribution that was expanded before the
run goes on checking its values, which is a branch on them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import MixtureSameFamily, Multinomial, hmm
from pyro.ops import special
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.distributions.layers import layers, unvalidated
from pyro_ebm.ops.constraints import plain


class VmapSafe(Messenger):
    """Replaces such distributions at sample sites.

    Example:
        >>> import pyro
        >>> with VmapSafe():
        ...     x = pyro.sample("x", Multinomial(2, torch.ones(3)), obs=torch.tensor([2.0, 0, 0]))
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        better = _BETTER.get(type(msg["fn"]))
        if better is not None:
            msg["fn"] = copy.copy(msg["fn"])
            msg["fn"].__class__ = better
        if any(getattr(layer, "_validate_args", False) for layer in layers(msg["fn"])):
            msg["fn"] = unvalidated(msg["fn"])


@contextmanager
def vmap_safe_operations() -> Iterator[None]:
    """Inside, two functions of Pyro are made of operations that ``vmap`` follows."""
    given = special._SafeLog, hmm._logmatmulexp
    special._SafeLog, hmm._logmatmulexp = _Log, _logmatmulexp
    try:
        yield
    finally:
        special._SafeLog, hmm._logmatmulexp = given


class _Log:
    """The logarithm whose slope is at most 1 / eps."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        at = x.detach()
        return at.log() + (x - at) / at.clamp_min(torch.finfo(x.dtype).eps)


class _Multinomial(Multinomial):
    """Scores without writing."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, value = torch.broadcast_tensors(self.logits, value)
        powers = torch.where(value == 0, 0.0, value * logits)
        ways = torch.lgamma(value.sum(-1) + 1.0) - torch.lgamma(value + 1.0).sum(-1)
        return ways + powers.sum(-1)


def _logmatmulexp(x: Tensor, y: Tensor) -> Tensor:
    """The log of the product of two matrices given by their logs; Pyro's clamps in place."""
    least = torch.finfo(x.dtype).min
    x_shift = x.detach().amax(-1, keepdim=True).clamp_min(least)
    y_shift = y.detach().amax(-2, keepdim=True).clamp_min(least)
    product = torch.matmul((x - x_shift).exp(), (y - y_shift).exp())
    return special.safe_log(product) + x_shift + y_shift


class _Mixture(MixtureSameFamily):
    """Says what its components live on."""

    @property
    def support(self) -> Constraint:
        return plain(super().support)


_BETTER = {Multinomial: _Multinomial, MixtureSameFamily: _Mixture}
