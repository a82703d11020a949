"""What every way to a posterior over parameters returns: draws, and how far to trust them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.chains import Record, summary, to_arviz
from pyro_ebm.poutine import surrogate

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A model with its positional and keyword arguments."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """Draws of a model's latents, why they were made so, and what speaks against them.

    Args:
        record: The draws, ``(chains, draws) + event_shape`` by site, with their statistics.
        method: The way that was taken, such as ``"exchange"``.
        reasons: Why it was taken, a sentence each.
        remarks: What would make it better, or is to be known before it is used, a sentence each.
        calibration: Of a generalized posterior, how its width was set: ``"sandwich"``,
            ``"simulation"``, ``"asymptotic"`` where it is right by itself for many rows of the
            model, or, which says nothing of how well the parameters are known, ``"none"``, or
            ``"unweighted"`` where nothing says how often the loss counts against the prior;
            ``None`` for a posterior by Bayes' rule.
        scored_by: What gave EBM sites their log Z at every draw, if the model itself does not: the
            objective of ``surrogate`` that log likelihoods are by.
        call: The model with its positional and keyword arguments, where it is known.

    Example:
        >>> import numpy as np
        >>> print(Posterior(Record({"theta": np.zeros((4, 10))}), "exchange", ("Z is unknown.",)))
        exchange: 4 chains of 10 draws
          because: Z is unknown.
    """

    record: Record
    method: str
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    calibration: str | None = None
    scored_by: Any = None
    call: Call | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What is saved: all but the call, since models are often local functions."""
        return {**self.__dict__, "call": None}

    @property
    def is_calibrated(self) -> bool:
        """Whether the width of the draws means what the width of a posterior should mean."""
        return self.calibration not in ("none", "unweighted")

    def summary(self) -> Any:
        """Returns a table with mean, sd, rank R-hat and effective sample sizes."""
        return summary(self.record)

    def get_samples(self) -> dict[str, Tensor]:
        """Returns the draws by site, chains joined, as ``pyro.infer.Predictive`` wants them.

        Shape ``(chains * draws,) + event_shape``, chain after chain.
        """
        draws = self.record.draws.items()
        return {name: torch.as_tensor(values).flatten(0, 1) for name, values in draws}

    def to_arviz(self, **options: Any) -> Any:
        """Returns the draws for ArviZ; ``options`` are those of :func:`pyro_ebm.to_arviz`.

        With ``log_likelihood=True`` the log likelihood is that of the posterior, also where its way
        has summed or integrated log Z itself: of the model and arguments that ``posterior`` was
        given, if there is no ``model=``.
        """
        is_asked = options.get("log_likelihood", False) is not False
        if self.call is not None and is_asked and "model" not in options:
            options = dict(zip(("model", "args", "kwargs"), self.call, strict=True)) | options
        if self.scored_by is not None and options.get("model") is not None:
            options["model"] = surrogate(options["model"], self.scored_by)
        return to_arviz(self.record, **options)

    def __str__(self) -> str:
        record = self.record
        label = "" if self.is_calibrated else " (uncalibrated)"
        head = f"{self.method}{label}: {record.num_chains} chains of {record.num_samples} draws"
        reasons = [f"  because: {sentence}" for sentence in self.reasons]
        remarks = [f"  note: {sentence}" for sentence in self.remarks]
        return "\n".join([head, *reasons, *remarks])
