r"""The result type of everything that estimates :math:`\log Z`.

An estimate is a value *at one set of parameters*. It therefore remembers which tensors it was made
at and in which version, and reports itself stale once one of them has been changed in place by an
optimizer. Assignments to ``p.data`` do not move torch's version counter and stay invisible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LogNormalizer:
    r"""An estimate of :math:`\log Z` in nats with its error bar.

    Args:
        value: The estimate, any shape that broadcasts with the distribution's ``batch_shape``.
        stderr: Standard error of ``value`` in nats, or ``None`` where the method has none.
        method: Name of the estimator.
        ess: Effective sample size of the weights behind the estimate.
        khat: Pareto tail index of those weights.
        lower: A stochastic lower bound in nats.
        upper: A stochastic upper bound in nats.
        parameters: The tensors the estimate depends on; their versions are recorded now.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> z = LogNormalizer(torch.tensor(0.3), method="importance", parameters=(weight,))
        >>> z.is_stale
        False
        >>> with torch.no_grad():
        ...     _ = weight.add_(1.0)
        >>> z.is_stale
        True
    """

    value: Tensor
    stderr: Tensor | None = None
    method: str = "given"
    ess: float | None = None
    khat: float | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    parameters: tuple[Tensor, ...] = field(default=(), repr=False)
    _versions: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", torch.as_tensor(self.value))
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "_versions", _versions(self.parameters))

    @property
    def is_stale(self) -> bool:
        """Whether a parameter has been changed in place since the estimate was made."""
        return self._versions != _versions(self.parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Copies restart torch's version counters, so freshness travels as a flag."""
        return {**self.__dict__, "_versions": self.is_stale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        versions = (-1,) if state["_versions"] else _versions(self.parameters)
        object.__setattr__(self, "_versions", versions)


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if not t.is_inference())
