r"""The result type of everything that estimates :math:`\log Z`.

An estimate is a value *at one set of parameters*. It therefore remembers which tensors it was made
at and in which version, and reports itself stale once one of them has been changed in place by an
optimizer. Assignments to ``p.data`` do not move torch's version counter and stay invisible.

An error bar is worth what it rests on. :attr:`LogNormalizer.doubts` lists, in words, the reasons
not to trust one: too few effective draws, a Pareto tail index that says that the variance of the
weights may not exist, parameters that have moved, and what the estimator itself has to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MIN_ESS = 100
"""Effective draws below which no interval is given: standard errors are too small there."""


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
        num_samples: How many draws the weights are of.
        start: Where the draws come from: ``"base"``, ``"data"`` and the like. Estimates that share
            a start miss the same modes, so that their agreement says little.
        remarks: What else speaks against the error bar, a sentence each.
        parameters: The tensors the estimate depends on; their versions are recorded now.
        serve: Called with the number of rows of one law that a model subtracts the value for.

    Example:
        >>> import torch
        >>> print(LogNormalizer(torch.tensor(0.3), torch.tensor(0.02), "ais", ess=412.0,
        ...                     num_samples=1000, start="base"))
        log Z = 0.300 ± 0.020 nats (ais, from the base, ESS 412 of 1000)
        >>> print(LogNormalizer(torch.tensor(0.3), torch.tensor(0.4), "ais", ess=12.0))
        log Z = 0.30 ± 0.40 nats (ais, ESS 12); not to be trusted: effective sample size 12 < 100
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
    num_samples: int | None = None
    start: str | None = None
    remarks: tuple[str, ...] = ()
    parameters: tuple[Tensor, ...] = field(default=(), repr=False)
    serve: Callable[[Tensor], None] | None = field(default=None, repr=False)
    _versions: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", torch.as_tensor(self.value))
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "_versions", _versions(self.parameters))

    @property
    def is_stale(self) -> bool:
        """Whether a parameter has been changed in place since the estimate was made."""
        return self._versions != _versions(self.parameters)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons not to trust value and error bar, a sentence each; empty if there is none."""
        found = list(self.remarks)
        if not bool(self.value.isfinite().all()):
            found.append("it is not finite")
        if self.ess is not None and self.ess < MIN_ESS:
            found.append(f"effective sample size {self.ess:.0f} < {MIN_ESS}")
        if self.khat is not None and not self.khat < self._largest_khat():
            found.append(
                f"Pareto tail index {self.khat:.2f} > {self._largest_khat():.2f}: the weights have "
                "so heavy a tail that their error bar means nothing"
            )
        if self.is_stale:
            found.append("parameters have changed since")
        return tuple(found)

    @property
    def is_trusted(self) -> bool:
        """Whether nothing speaks against value and error bar."""
        return not self.doubts

    def _largest_khat(self) -> float:
        """The threshold of Vehtari et al. 2024, eq. 13."""
        if self.num_samples is None:
            return 0.7
        return min(1.0 - 1.0 / math.log10(max(self.num_samples, 11)), 0.7)

    def interval(self, num_stderrs: float = 1.96) -> tuple[Tensor, Tensor]:
        """Returns an interval in nats, by default of 95 per cent.

        Args:
            num_stderrs: Its half width in standard errors.

        Raises:
            ValueError: If the estimate has no standard error, or is not to be trusted.
        """
        if self.stderr is None:
            raise ValueError(f"{self.method} has no standard error, hence no interval")
        if not self.is_trusted:
            raise ValueError(f"no interval can be given: {'; '.join(self.doubts)}")
        return self.value - num_stderrs * self.stderr, self.value + num_stderrs * self.stderr

    def __str__(self) -> str:
        facts = [self.method]
        if self.start is not None:
            facts.append(f"from the {self.start}")
        if self.ess is not None:
            of = "" if self.num_samples is None else f" of {self.num_samples}"
            facts.append(f"ESS {self.ess:.0f}{of}")
        text = f"log Z = {self._figures()} nats ({', '.join(facts)})"
        return text if self.is_trusted else f"{text}; not to be trusted: {'; '.join(self.doubts)}"

    def _figures(self) -> str:
        """Value and error with two digits of the error; a range where there are many."""
        if self.value.numel() != 1:
            low, high = self.value.min().item(), self.value.max().item()
            return f"{low:.4g} to {high:.4g} (shape {tuple(self.value.shape)})"
        value = self.value.item()
        if self.stderr is None or not float(self.stderr) > 0:
            return f"{value:.8g}"
        error = float(self.stderr)
        digits = max(0, 1 - math.floor(math.log10(error))) if math.isfinite(error) else 3
        return f"{value:.{digits}f} ± {error:.{digits}f}"

    def __getstate__(self) -> dict[str, Any]:
        """Copies restart torch's version counters, so freshness travels as a flag."""
        return {**self.__dict__, "_versions": self.is_stale, "serve": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        versions = (-1,) if state["_versions"] else _versions(self.parameters)
        object.__setattr__(self, "_versions", versions)


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if not t.is_inference())
