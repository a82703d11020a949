"""Parameters and data of a Pyro model drawn together, many at once.

Calibration tests need draws of the model itself: parameters from their prior, data given them, and
both exact. A whole batch is drawn by ``vmap`` where the model's samplers allow it, else one by one.

Discrete latents of finite support are drawn, too, but are no parameters: kernels sum them out, and
draw from the posterior of all others, whose law with the data is the marginal one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_ebm.distributions import unwrap
from pyro_ebm.mcmc.targets.explain import name_of
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.mcmc.targets.vmap_safe import VmapSafe, vmap_safe_operations

OfOne = Callable[[Values, Values], Tensor]
"""A scalar of one draw of the parameters and its data set."""


class Simulator:
    """Draws from a model.

    Args:
        model: A Pyro model without arguments.
        sites: Names of the sites that are data.

    Attributes:
        parameters: Names of the other sites that kernels draw.
        knows_likelihood: Whether the density of the data given them can be had: log Z is known, and
            nothing is summed out.

    Raises:
        ValueError: If a site does not exist, something else is observed, there is a factor, or a
            site is not drawn exactly.
    """

    def __init__(self, model: Callable[[], Any], sites: Sequence[str]) -> None:
        self.model = model
        self.sites = tuple(sites)
        with torch.no_grad():
            trace = _trace(model, {})
        nodes = {n: s for n, s in trace.nodes.items() if s["type"] == "sample"}
        self._check(nodes)
        latents = [n for n, s in nodes.items() if n not in self.sites and not _is_fixed(s)]
        self.parameters = tuple(n for n in latents if not nodes[n]["fn"].has_enumerate_support)
        laws = [unwrap(nodes[name]["fn"]) for name in self.sites]
        has_log_z = all(law is None or law.is_normalized for law in laws)
        self.knows_likelihood = has_log_z and len(self.parameters) == len(latents)
        self._at_once: dict[str, bool] = {}

    def _check(self, nodes: dict[str, Any]) -> None:
        missing = [name for name in self.sites if name not in nodes]
        if missing or not self.sites:
            raise ValueError(
                f"{name_of(self.model)} has no site {missing or self.sites}: sites= names the data"
            )
        for name, site in nodes.items():
            is_factor = isinstance(site["fn"], dist.Unit)
            if is_factor:
                raise ValueError(
                    f"factor {name!r} changes the law of {name_of(self.model)}, which running it "
                    "does not draw from: write it as a sample site whose density it is (of a "
                    "latent, or of data that are named in sites=)"
                )
            if site["is_observed"] and not _is_fixed(site):
                raise ValueError(
                    f"site {name!r} is observed in {name_of(self.model)} itself, and simulation "
                    "must draw it: leave obs= out and name it in sites="
                )
            law = unwrap(site["fn"])
            if law is not None and not law.has_exact_sample:
                raise ValueError(
                    f"EBM site {name!r} is drawn by short chains, or by a sampler that does not "
                    "say that it is exact, and calibration needs exact draws: give the energy an "
                    "exact sample(), or the distribution a sampler= with draws_are_exact = True"
                )

    def joint(self, num: int) -> tuple[Values, Values]:
        """Returns ``num`` draws of parameters and data, ``(num,)`` + the site's shape each."""
        drawn = self._rows(self._all, num, {})
        return {n: drawn[n] for n in self.parameters}, {n: drawn[n] for n in self.sites}

    def data(self, parameters: Values) -> Values:
        """Returns a data set for every row of the parameters."""
        return self._rows(self._data, len(next(iter(parameters.values()))), parameters)

    def _all(self, given: Values) -> Values:
        nodes = _trace(self.model, given).nodes
        return {name: nodes[name]["value"] for name in (*self.parameters, *self.sites)}

    def _data(self, given: Values) -> Values:
        nodes = _trace(self.model, given).nodes
        return {name: nodes[name]["value"] for name in self.sites}

    @torch.no_grad()
    def _rows(self, draw: Callable[[Values], Values], num: int, given: Values) -> Values:
        """Draws ``num`` times, each time given one row."""

        def one(number: Tensor, row: Values) -> Values:
            with _OneForEachRow(number):
                return draw(row)

        def at_once() -> Values:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                return torch.vmap(one, randomness="different")(torch.arange(num), given)

        if draw.__name__ not in self._at_once:
            self._at_once[draw.__name__] = _works(at_once)
        if self._at_once[draw.__name__]:
            return at_once()
        rows = [draw({name: value[i] for name, value in given.items()}) for i in range(num)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def log_likelihood(self, parameters: Values, data: Values) -> Tensor:
        """Returns the log density in nats of one data set at one draw of the parameters."""
        with vmap_safe_operations(), VmapSafe():
            trace = _trace(self.model, {**parameters, **data})
            trace.compute_log_prob(lambda name, site: name in self.sites)
        terms = [trace.nodes[name]["log_prob_sum"] for name in self.sites]
        return torch.stack(terms).sum()


def scalars(values: Values) -> Values:
    """Returns every entry of every site under a name of its own, ``(num,)`` each.

    Args:
        values: Site name to values ``(num,)`` + the site's shape.

    Example:
        >>> list(scalars({"a": torch.zeros(5), "b": torch.zeros(5, 2)}))
        ['a', 'b[0]', 'b[1]']
    """
    found: Values = {}
    for name, value in values.items():
        for index in torch.ones(value.shape[1:]).nonzero().tolist():
            label = f"{name}[{','.join(map(str, index))}]" if index else name
            found[label] = value[(slice(None), *index)]
    return found


@torch.no_grad()
def evaluated(fn: OfOne, parameters: Values, data: Values) -> Tensor:
    """Returns a quantity of one draw for all rows, ``(num,)``."""

    def one(parameters: Values, data: Values) -> Tensor:
        return torch.func.vjp(lambda p: fn(p, data).reshape(()), parameters)[0]  # for Pyro

    with pyro.validation_enabled(is_validate=False):
        return torch.vmap(one)(parameters, data)


def _trace(model: Callable[[], Any], given: Values) -> Any:
    with poutine.block(), pyro.validation_enabled(is_validate=False):
        return poutine.trace(poutine.condition(model, given)).get_trace()


class _OneForEachRow(TorchFunctionMode):
    """Makes new tensors those of a row under vmap, so that samplers may draw into them.

    ``torch.empty(shape).normal_()``, which half of torch's distributions do, would be one draw for
    all rows, and is refused.

    Args:
        number: The row's number.
    """

    def __init__(self, number: Tensor) -> None:
        super().__init__()
        self._zero = 0 * number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made + self._zero.to(made.dtype) if func in _MAKERS else made


_MAKERS = {torch.empty, torch.empty_like, torch.Tensor.new, torch.Tensor.new_empty}


def _works(draw: Callable[[], Any]) -> bool:
    """Whether vmap follows the samplers; many write in place, or draw until they are done."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            draw()
        except Exception:  # vmap and samplers fail in many ways; one by one, errors are raised
            return False
    return True


def _is_fixed(site: dict[str, Any]) -> bool:
    """Whether a site is a plate's rows or a deterministic function, and nothing random."""
    return site_is_subsample(site) or bool((site["infer"] or {}).get("_deterministic"))
