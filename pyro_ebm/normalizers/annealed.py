r"""What annealing makes of its log weights, one way or both ways.

Forward weights w lead from a start that is drawn exactly to the law, and :math:`\log \operatorname
{mean} w` is low on average; backward weights lead from draws of the law to the start, and
:math:`-\log \operatorname{mean} w` is high on average if those draws are exact. Both together are
two sets of log ratios, of which Bennett's estimate is the optimal bridge.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.normalizers.bridge import bridged
from pyro_ebm.normalizers.importance import from_weights
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.log_space import log_mean_exp
from pyro_ebm.ops.nan_energies import NaNCount


def annealed(
    forward: Tensor,
    backward: Tensor | None,
    *,
    start: str,
    law: EnergyDistribution,
    exact: bool,
    seen: NaNCount | None = None,
) -> LogNormalizer:
    """Returns the estimate, with its value as ``lower`` and with ``upper`` where there is one.

    Args:
        forward: Log weights from the start to the law, ``(N,)``.
        backward: Log weights from draws of the law to the start, ``(M,)``, if there are such.
        start: What is drawn exactly, and has Z = 1.
        law: The law.
        exact: Whether the draws of the law are independent ones of the law itself.
        seen: Energies that were NaN on the ways.

    Raises:
        NonFiniteEnergyError: If no forward weight counts, or one is infinite.
    """
    up = from_weights(forward, "ais", start=start, law=law, seen=seen)
    if backward is None:
        return replace(up, lower=up.value)
    ends = f"{start} and the draws"
    both = bridged(-backward[None], forward, "ais, both ways", start=ends, law=law, seen=seen)
    upper = -log_mean_exp(backward) if exact else None
    return replace(both, lower=up.value, upper=upper)
