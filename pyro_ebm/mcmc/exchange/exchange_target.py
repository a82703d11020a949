r"""A Pyro model whose observed EBM sites lack log Z, with what exchange needs to know of them.

The potential leaves log Z out: :math:`U(\theta) = -\log\pi(\theta) + \sum_s E_\theta(x_s) +
\dots`. Beside it stand, for the sites that log Z is missing from, the natural parameters as
functions of the latents, vectorized over chains by running the model under ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.distributions.layers import mask_of
from pyro_ebm.distributions.supports import check_observed
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.mcmc.exchange.fixed_sites import check_fixed_sites
from pyro_ebm.mcmc.targets.captured import CapturedFunction
from pyro_ebm.mcmc.targets.each_chain import EachChain
from pyro_ebm.mcmc.targets.explain import name_of
from pyro_ebm.mcmc.targets.model_target import ModelTarget, set_up
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.mcmc.targets.vmap_safe import VmapSafe, vmap_safe_operations
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.poutine.aside import aside
from pyro_ebm.poutine.surrogate import SiteScorer, SurrogateDistribution, surrogate
from pyro_ebm.poutine.whole_data import check_counted_once, check_unscaled


class UnnormalizedSites(SiteScorer):
    """Scores observed EBM sites without log Z where it is not known, as frozen objectives do."""

    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **context: Any) -> Tensor:
        """Returns -U(x) in nats, less log Z where it is known."""
        return p.log_prob(x) if p.is_normalized else p.unnormalized_log_prob(x)


class ExchangeTarget(ModelTarget):
    """The target of a model without the log Z's that are missing.

    Made by :func:`exchange_target`.

    Attributes:
        observed: Values of the sites without log Z, ``B + event`` each, or ``(C,) + B + event``
            where every chain has data of its own; masked rows hold one that counts, for sweeps
            start there and what is missing may be NaN.
        energies: Their energies, as the model made them once; parameters are of no account.
        weights: What counts of each site, ``B``: scale times mask.
        draws_are_exact: Whether the energies of all these sites draw from their laws themselves.
        without_samples: The sites whose energy has no exact sampler for their law.
        without_sweeps: The sites whose energy has no kernel for it.
    """

    observed: Values
    energies: dict[str, Any]
    weights: Values
    draws_are_exact: bool
    without_samples: list[str]
    without_sweeps: list[str]

    def watch(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Remembers the model and looks at its sites once.

        Raises:
            ValueError: If no observed EBM site lacks its log Z, data lie off a support, or a site's
                statistics, mask or scale depend on a latent.
        """
        self._run = lambda: model(*args, **kwargs)
        self._scored = VmapSafe()(surrogate(model, UnnormalizedSites()))
        self._arguments = args, kwargs
        with torch.no_grad(), aside():
            sites = self._sites_at(self.first)
        if not sites.laws:
            raise ValueError(
                f"{self.name} has no observed EBM site without log Z: use HMC or NUTS, or where a "
                "site's log Z is known and too slow, is_tractable = False in a class of its energy"
            )
        self.observed, self.weights = dict(sites.observed), sites.weights
        _check_unscaled(sites.weights)
        if self.each is not None:
            self._look_at_each()
        for name, law in sites.laws.items():
            check_observed(name, law.support, self.observed[name], self.weights[name] > 0)
            self.observed[name] = self._without_padding(name, law)
        check_fixed_sites(self, self._sites_at, sites.observed)
        self.energies = {name: law.energy_function for name, law in sites.laws.items()}
        laws = sites.laws.items()
        self.without_samples = [name for name, law in laws if not law.energy_draws_exactly]
        self.draws_are_exact = not self.without_samples
        self.without_sweeps = [name for name, law in laws if not law.energy_sweeps]
        self._has_base = any(law.base is not None for law in sites.laws.values())
        self._captured = CapturedFunction(self._naturals, self.name, compile=False, capture=True)

    def _look_at_each(self) -> None:
        """Takes the data of all chains, which must count alike."""
        assert self.each is not None
        self.observed |= {n: self.each.data[n] for n in self.observed if n in self.each.data}
        with rng_preserved(), torch.no_grad():
            q = self.draw_start(self.each.num_chains)
            weights = self.over_rows(lambda row: self._sites_at(row).weights, q)
        for name, weight in weights.items():
            if not bool((weight == self.weights[name]).all()):
                raise ValueError(
                    f"EBM site {name!r}: its mask differs between chains, and exchange has one for "
                    "all: run chains of one mask at a time"
                )

    def _without_padding(self, name: str, law: EnergyDistribution) -> Tensor:
        scored = SurrogateDistribution(
            law, EnergyDistribution.unnormalized_log_prob, self.weights[name] != 0
        )
        return scored.without_padding(self.observed[name])

    def weighted(self, name: str, terms: Tensor, *, event_dim: int = 0) -> Tensor:
        """Returns terms of a site's elements times what counts of each; of masked ones 0, not NaN.

        Args:
            name: The site.
            terms: Of shape ``... + B`` and ``event_dim`` dims more.
            event_dim: How many dims each term has.
        """
        weight = self.weights[name]
        weight = weight.reshape(weight.shape + (1,) * event_dim)
        return torch.where(weight != 0, terms * weight, 0.0)

    def families(self) -> Mapping[str, ExponentialFamily] | None:
        """The sites' energies if all are linear in their parameters and none has a base."""
        found = {n: e for n, e in self.energies.items() if isinstance(e, ExponentialFamily)}
        return found if len(found) == len(self.energies) and not self._has_base else None

    def score(self, values: Values) -> None:
        """Runs the model as its potential does, at values of its latents, for handlers around."""
        args, kwargs = self._arguments
        with vmap_safe_operations():
            poutine.condition(self._scored, values)(*args, **kwargs)

    def _sites_at(self, q: Tensor) -> _Sites:
        """The EBM sites at one position."""
        with poutine.block(), _Sites(self._shapes.keys()) as sites:
            poutine.condition(self._run, self.on_support(q))()
        return sites

    def naturals(self, q: Tensor) -> Values:
        """Returns the natural parameters of every site, ``(C,) + B + (p,)``."""
        return dict(zip(self.energies, self._captured(q), strict=True))

    def naturals_with_graph(self, q: Tensor) -> Values:
        """Returns the same, differentiable in q: what goes by derivatives needs their slopes."""
        with pyro.validation_enabled(is_validate=False), torch.enable_grad():
            return dict(zip(self.energies, self._naturals(q), strict=True))

    def _naturals(self, q: Tensor) -> tuple[Tensor, ...]:
        def one(row: Tensor) -> tuple[Tensor, ...]:
            laws = self._sites_at(row).laws
            found = {name: laws[name].energy_function.natural() for name in self.energies}  # type: ignore[attr-defined]
            return tuple(
                natural.expand(laws[name].batch_shape + natural.shape[-1:])
                for name, natural in found.items()
            )

        values: tuple[Tensor, ...] = self.over_rows(one, q)
        return values


class _Sites(Messenger):
    """Collects the observed EBM sites whose log Z is not known.

    Args:
        latents: Names of sites that are held at values, and are no data for it.
    """

    def __init__(self, latents: Collection[str]) -> None:
        super().__init__()
        self.latents = latents
        self.laws: dict[str, EnergyDistribution] = {}
        self.observed: Values = {}
        self.weights: Values = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        law = unwrap(msg["fn"])
        name, x = msg["name"], msg["value"]
        is_data = msg["is_observed"] and name not in self.latents
        if law is None or not is_data or law.is_normalized:
            return
        if x.dim() > len(law.batch_shape + law.event_shape):
            raise ValueError(_sentence(name, x, law))
        check_counted_once(msg)
        self.laws[name] = law
        self.observed[name] = x.expand(law.batch_shape + law.event_shape)
        self.weights[name] = _weight(msg, law, x)


def _sentence(name: str, x: Tensor, law: EnergyDistribution) -> str:
    laws = f"laws of batch shape {tuple(law.batch_shape)} and" if law.batch_shape else "one law of"
    return (
        f"EBM site {name!r}: data of shape {tuple(x.shape)} for {laws} event shape "
        f"{tuple(law.event_shape)}: put the site in a pyro.plate of the rows, or .expand() the "
        "distribution and declare them by .to_event()"
    )


def _weight(msg: Any, law: EnergyDistribution, x: Tensor) -> Tensor:
    """What counts of a site, scale times mask; no branch, for the scale may be one of vmap."""
    mask = mask_of(msg["fn"], msg["mask"])
    counts = torch.as_tensor(mask, device=x.device).expand(law.batch_shape)
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return counts.to(dtype) * torch.as_tensor(msg["scale"], dtype=dtype, device=x.device)


def _check_unscaled(weights: Values) -> None:
    for name, weight in weights.items():
        check_unscaled(
            name,
            weight[weight != 0],
            "exchange needs all of the data at once",
            "take poutine.scale and subsamples away",
        )


def exchange_target(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    initial_params: Mapping[str, Tensor] | None = None,
) -> ExchangeTarget:
    """Returns the target of a Pyro model with these arguments.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        initial_params: As for :func:`~pyro_ebm.mcmc.targets.model_target.set_up`.

    Raises:
        TypeError: If the model is not a function.
        ValueError: If no observed EBM site lacks its log Z, or one is scaled.
    """
    if not callable(model) or isinstance(model, EnergyDistribution):
        raise TypeError(
            f"Exchange samples the latents of a Pyro model, got {type(model).__name__}: put the "
            "distribution at an observed site of one"
        )
    each = model if isinstance(model, EachChain) else None
    scored = surrogate(model, UnnormalizedSites())
    ready = set_up(
        scored, args, kwargs, initial_params=initial_params, each=each, name=name_of(model)
    )
    target = ExchangeTarget(*ready)
    target.hold_flat()
    target.watch(model, args, kwargs)
    return target
