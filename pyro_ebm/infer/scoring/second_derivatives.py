"""Losses that differentiate an energy twice, of which not every operation of torch is capable.

Attention has fused kernels whose derivative has none. What they compute can be had from others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.ops.module_calls import buffers_restored

__all__ = ["check_second_derivatives", "remedies_named"]


@contextmanager
def remedies_named(name: str, who: str) -> Iterator[None]:
    """Surrounds second derivatives of an energy.

    Args:
        name: The site.
        who: The objective.

    Raises:
        NotImplementedError: If torch has none of an operation in it, with what to do.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if "derivative for" not in said or "is not implemented" not in said:
            raise
        remedy = "write the operation by others that have one"
        if "scaled_dot_product" in said:
            remedy = (
                "train within `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):`, whose "
                "attention has one"
            )
        raise NotImplementedError(
            f"EBM site {name!r}: {who} differentiates the energy twice, and torch has no second "
            f"derivative of an operation in it ({said}): {remedy}, or use an objective with first "
            "derivatives alone, such as NCE or EnergyDiscrepancy"
        ) from error


def check_second_derivatives(name: str, p: EnergyDistribution, x: Tensor, who: str) -> None:
    """Raises ``NotImplementedError`` if torch cannot differentiate an energy at ``x`` twice.

    Example:
        >>> p = EnergyDistribution(lambda x: x**4, event_shape=())
        >>> check_second_derivatives("x", p, torch.ones(3), "A loss")
    """
    slope = torch.func.grad(lambda at: p.energy(at).sum())
    with remedies_named(name, who), buffers_restored():
        torch.func.grad(lambda at: slope(at).sum())(x)
