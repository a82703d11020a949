"""What values of EBM sites must be: given by data or guide, on the support, of one energy a row.

What is asked of all sites of a run is asked before any is scored: Pyro wraps a ``ValueError`` of a
log density into a table of all shapes of the model.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import EnergyShapeError
from pyro_ebm.infer.contrast import rows_of
from pyro_ebm.poutine.surrogate import surrogate_of


def given(model_trace: Any, guide_trace: Any, used: Collection[str]) -> None:
    """Raises ``ValueError`` for an EBM site whose value is a draw of its own.

    Draws of the energy would be told from draws of the contrast, and nothing learned of any data.
    """
    for name in used:
        if not model_trace.nodes[name]["is_observed"] and name not in guide_trace.nodes:
            raise ValueError(
                f"EBM site {name!r} is neither observed nor in the guide, so that its values are "
                "draws of the energy itself, from which nothing is learned: pass obs= if it has "
                "data, or give the guide a sample site of this name if it is a latent"
            )


def on_support(name: str, site: Any) -> None:
    """Raises ``ValueError`` if data of an EBM site are NaN, infinite or off its support.

    Masked rows may be anything. The support is looked at where the distribution validates values.

    Args:
        name: The site's name.
        site: Its node in a trace, with the surrogate in place.
    """
    if get_proxy_mode() is not None:
        return
    scored = surrogate_of(site["fn"])
    x = scored.p.broadcast_value(scored.without_padding(site["value"].detach()))
    bad, what = ~x.isfinite(), "NaN or infinite, not"
    if scored._validate_args and not bad.any():
        bad, what = ~scored.support.check(x), "not"
    if bad.any():
        rows = bad.reshape(rows_of(scored.p, x) + (-1,)).any(-1)
        raise ValueError(
            f"EBM site {name!r}: {int(rows.sum())} of {rows.numel()} rows of the data are {what} "
            f"points of the support {scored.support}: leave these out, or mask them by poutine.mask"
        )


def one_energy_per_row(name: str, p: EnergyDistribution, x: Tensor) -> None:
    """Raises ``EnergyShapeError`` for an energy with dims of size one before those of ``x``.

    Draws beside the rows have that place, and would be taken for one another.
    """
    with torch.no_grad():
        shape = p.energy(x).shape
    rows = rows_of(p, x)
    extra = len(shape) - len(rows)
    if extra > 0 and shape[:extra].numel() == 1:
        raise EnergyShapeError(
            f"EBM site {name!r}: energy returned shape {tuple(shape)} for input {tuple(x.shape)}; "
            f"expected {tuple(rows)}, one value per event. Did you add a dim in front, as "
            "unsqueeze(0) or a parameter of shape (1, 1) does?"
        )
