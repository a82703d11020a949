r"""Log Z by importance sampling.

.. math:: \hat Z = \frac1S \sum_s \frac{e^{-U(x_s)}}{q(x_s)}, \qquad x_s \sim q,

unbiased for Z, if q leaves no part of the law's support out; its logarithm is low by about half its
variance. The standard error is the delta method's, :math:`\sqrt{(S / \mathrm{ESS} - 1) / S}`, or
that of the fit to the tail of the weights where it is larger (:mod:`pyro_ebm.ops.pareto`), and the
Pareto tail index says whether either means anything. None sees a mode that no draw has come near.

Reference:
    Vehtari, Simpson, Gelman, Yao, Gabry, Pareto smoothed importance sampling, JMLR 25(72), 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.normalizers.laws import normalized_on, parameters_at, single, within
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.log_space import effective_sample_size, log_mean_exp
from pyro_ebm.ops.nan_energies import NaNCount
from pyro_ebm.ops.pareto import pareto_tail


def importance(
    dist: EnergyDistribution, proposal: Any = None, *, num_samples: int = 10_000
) -> LogNormalizer:
    """Estimates log Z by importance sampling.

    Args:
        dist: A distribution with ``batch_shape == ()``.
        proposal: A normalized distribution on the same support or a larger one, with tails at least
            as heavy; the base if not given, which serves for weak tilts only.
        num_samples: S; the standard error falls as ``1 / sqrt(S)``.

    Returns:
        ``LogNormalizer`` in nats with ``stderr``, ``ess`` and ``khat``.

    Raises:
        ValueError: If there is neither a proposal nor a base, the event shapes differ, or the
            proposal leaves a part of the support out.
        NonFiniteEnergyError: If no draw has a finite energy, or one has minus infinity.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
        >>> print(importance(law))  # doctest: +ELLIPSIS
        log Z = -0.34... ± 0.00... nats (importance, from the base, ESS ... of 10000)
    """
    law = single(dist, "importance sampling")
    start = "base" if proposal is None else "proposal"
    q = normalized_on(law, proposal, "proposal")
    with torch.no_grad():
        x = q.sample(torch.Size((whole("num_samples", num_samples, least=2),)))
        log_weights = -law.energy(x) if proposal is None else -law.potential(x) - q.log_prob(x)
    return from_weights(within(law, q, x, log_weights), "importance", start=start, law=law, at=x)


def from_weights(
    log_weights: Tensor,
    method: str,
    *,
    start: str,
    law: EnergyDistribution,
    at: Tensor | None = None,
    seen: NaNCount | None = None,
) -> LogNormalizer:
    """Returns the estimate that independent weights make.

    Args:
        log_weights: ``(S,)``; their mean weight estimates Z.
        method: Name of the estimator.
        start: Where the draws come from.
        law: The law whose Z it is.
        at: Values of it in the dtype that the energy takes; a draw of the base if not given.
        seen: NaN energies that were counted before they came into the weights.

    Raises:
        NonFiniteEnergyError: If no weight counts, or one is infinite.
    """
    seen = seen or NaNCount()
    log_weights = -seen(-log_weights.double())
    if not bool(log_weights.max() > -torch.inf):
        raise NonFiniteEnergyError(f"{law!r}: none of {len(log_weights)} draws has a finite energy")
    if bool((log_weights == torch.inf).any()):
        raise NonFiniteEnergyError(f"{law!r}: the energy is minus infinity at a draw")
    num, ess = len(log_weights), float(effective_sample_size(log_weights))
    tail = pareto_tail(log_weights)
    return LogNormalizer(
        log_mean_exp(log_weights),
        log_weights.new_tensor(max((max(num / ess - 1.0, 0.0) / num) ** 0.5, tail.error)),
        method,
        ess=ess,
        khat=tail.khat,
        num_samples=num,
        start=start,
        remarks=seen.remarks,
        parameters=parameters_at(law, at),
    )
