"""Running a model twice at the same values of its latents, to learn what its sites depend on.

Once on tensors that carry Pyro's provenance, which every operation hands on and which discrete
values can carry too; once on leaves of an autograd graph, which also shows parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import ProvenanceTensor
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, unwrap
from pyro_ebm.errors import NonFiniteEnergyError


def without_value_checks() -> Any:
    """Checks of values would ask tensors with provenance for plain booleans."""
    return pyro.validation_enabled(is_validate=False)


class Pair(NamedTuple):
    """A site in two runs: on tensors that remember their origin, and on leaves of a graph."""

    name: str
    tracked: Any
    site: Any
    leaves: dict[str, Tensor]

    @property
    def is_factor(self) -> bool:
        """Whether the site is an energy factor and not a distribution."""
        return bool(self.site["infer"].get("energy_factor"))


def paired_runs(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Any, at: Mapping[str, Tensor]
) -> Iterator[Pair]:
    """Yields the EBM sites and energy factors of a model, scored at a draw from the prior.

    Raises:
        NonFiniteEnergyError: If an energy is not finite at its own site's value, or log Z is not.
        ValueError: If ``at`` names a site that is not a latent.
    """

    def run(data: Mapping[str, Tensor]) -> Any:
        return poutine.trace(poutine.condition(model, data=data)).get_trace(*args, **kwargs)

    values = _values(run, at)
    with torch.no_grad(), without_value_checks():
        tracked = run({k: ProvenanceTensor(v, frozenset({k})) for k, v in values.items()})
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in values.items()}
    with torch.enable_grad():
        trace = run(leaves)
    ours = [name for name, site in trace.nodes.items() if _is_ours(site)]
    with torch.no_grad():
        for name in ours:
            _require_finite(name, trace.nodes[name])
        trace.compute_log_prob(lambda name, site: name not in ours)
    for name in ours:
        yield Pair(name, tracked.nodes[name], trace.nodes[name], leaves)


def _is_ours(site: Any) -> bool:
    """Whether a site is an EBM or an energy factor."""
    if site["type"] != "sample":
        return False
    return unwrap(site["fn"]) is not None or bool(site["infer"].get("energy_factor"))


def _values(
    run: Callable[[Mapping[str, Tensor]], Any], at: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values of all latents: a draw from the prior given ``at``."""
    with torch.no_grad():
        trace = run({})
        names = [
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        ]
        if unknown := sorted(set(at) - set(names)):
            raise ValueError(f"check_model: at names {unknown}; the model's latents are {names}")
        trace = run(at) if at else trace
    return {name: trace.nodes[name]["value"].detach() for name in names}


def _require_finite(name: str, site: Any) -> None:
    if isinstance(unwrap(site["fn"]), GeneralizedEBM):  # it has no density in x
        return
    log_prob = site["fn"].log_prob(site["value"])
    bad = ~torch.isfinite(log_prob)
    if isinstance(site["mask"], Tensor):
        bad = bad & site["mask"]
    if bool(bad.any()) and site["mask"] is not False:
        if _lacks_log_z(unwrap(site["fn"]), site["value"]):
            raise NonFiniteEnergyError(
                f"check_model: log Z of site {name!r} is not finite where the model was run, while "
                "its energy is. Give values of its latents at which it is known (at=), or a "
                "log_normalizer that holds there"
            )
        raise NonFiniteEnergyError(
            f"check_model: the energy of site {name!r} is not finite in {int(bad.sum())} of "
            f"{bad.numel()} rows. Look for overflow in the energy at the site's value"
        )


def _lacks_log_z(p: EnergyDistribution | None, x: Tensor) -> bool:
    """Whether it is log Z that is not finite, and not the energy of every row."""
    log_z = None if p is None else p.log_normalizer_value()
    if p is None or log_z is None or bool(log_z.isfinite().all()):
        return False
    return bool(p.unnormalized_log_prob(x).isfinite().any())
