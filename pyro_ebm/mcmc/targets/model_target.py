"""Pyro models and potential functions as targets, vectorized over chains by ``vmap``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import Transform

from pyro_ebm.distributions import unwrap
from pyro_ebm.distributions.layers import mask_of
from pyro_ebm.distributions.supports import check_observed
from pyro_ebm.errors import MissingNormalizerError
from pyro_ebm.mcmc.targets.each_chain import EachChain, over_rows
from pyro_ebm.mcmc.targets.explain import explained, first_line, name_of
from pyro_ebm.mcmc.targets.first_point import AtValues, first_chain
from pyro_ebm.mcmc.targets.fixed_supports import check_fixed_supports
from pyro_ebm.mcmc.targets.target import Target, Values, check_names, lead_of
from pyro_ebm.mcmc.targets.vmap_safe import VmapSafe, vmap_safe_operations
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.poutine.check_model import check_structure, has_energies
from pyro_ebm.poutine.whole_data import check_counted_once

Potential = Callable[[dict[str, Tensor]], Tensor]


class ModelTarget(Target):
    """A potential over named unconstrained values of one chain.

    Args:
        potential_fn: Named unconstrained values, without a chain dim, to a 0-d potential in nats.
        like: One value per name, for shapes and dtypes: where the model was first run.
        transforms: Name to the transform *to* unconstrained space; missing names are real.
        name: What messages call it.
        each: The model behind it, if every chain has data of its own.

    Attributes:
        first: The position of ``like``, ``(D,)``: of a model, one of finite density, or the first
            chain's start if a run was given one.

    Raises:
        ValueError: If there is nothing to sample.
    """

    def __init__(
        self,
        potential_fn: Potential,
        like: Mapping[str, Tensor],
        transforms: Mapping[str, Transform] | None = None,
        name: str = "potential_fn",
        each: EachChain | None = None,
    ) -> None:
        if not like:
            raise ValueError(f"{name} has no latent site to sample")
        self.name = name
        self.each = each
        self._potential_fn = potential_fn
        self._shapes = {site: value.shape for site, value in like.items()}
        self._transforms = dict(transforms or {})
        self.dim = sum(prod(shape) for shape in self._shapes.values())
        first = next(iter(like.values()))
        self.dtype, self.device = first.dtype, first.device
        self.is_vectorized = self._try_vmap()
        self._flat: Tensor | None = None
        self.first = torch.cat([value.detach().reshape(-1) for value in like.values()])

    def __repr__(self) -> str:
        return self.name

    def split(self, q: Tensor) -> Values:
        """Returns the unconstrained values by name, for positions ``lead + (D,)``."""
        sizes = [prod(shape) for shape in self._shapes.values()]
        parts = zip(self._shapes.items(), q.split(sizes, -1), strict=True)
        return {site: part.reshape(q.shape[:-1] + shape) for (site, shape), part in parts}

    def _potential_of_one(self, q: Tensor) -> Tensor:
        with vmap_safe_operations():
            return self._potential_fn(self.split(q)).reshape(())

    def potential(self, q: Tensor) -> Tensor:
        """Returns U in nats, ``(C,)``, differentiable."""
        if self.is_vectorized:
            u = self.over_rows(self._potential_under_grad, q)
        else:
            u = over_rows(self._potential_of_one, q, self.each, at_once=False)
        return u if self._flat is None else u - self.flat_terms(q).sum(1)

    def over_rows(self, fn: Callable[[Tensor], Any], q: Tensor) -> Any:
        """Returns a function of one position at all of ``(C, D)``, each with its chain's data."""
        return over_rows(fn, q, self.each)

    def num_rows(self, least: int) -> int:
        """Returns how many positions to evaluate: as many as chains, where their data differ."""
        return least if self.each is None else self.each.num_chains

    def flat_terms(self, q: Tensor) -> Tensor:
        """Returns the log density of coordinates that are held, ``(C, D)``; 0 for all others."""
        if self._flat is None:
            return torch.zeros_like(q)
        held = torch.zeros(self.dim, dtype=torch.bool, device=q.device)
        held[self._flat] = True
        return torch.where(held, -0.5 * q.square(), 0.0)

    def _potential_under_grad(self, q: Tensor) -> Tensor:
        """The potential inside a level of differentiation: without one Pyro fails under vmap."""
        return torch.func.vjp(self._potential_of_one, q)[0]

    def _try_vmap(self) -> bool:
        """Whether ``vmap`` can follow the potential."""
        num = self.num_rows(2)
        q = torch.rand(num, self.dim, dtype=self.dtype, device=self.device)
        try:
            with pyro.validation_enabled(is_validate=False), torch.no_grad():
                self.over_rows(self._potential_under_grad, q)
        except torch.linalg.LinAlgError:  # by the values, not by vmap
            return True
        except Exception as error:  # vmap and models fail in many ways
            if "random operation" in str(error):
                return False  # refused where the run starts
            warnings.warn(
                f"{self.name} cannot be vectorized{self._site_to_blame(q)}, so its chains run one "
                f"after another, many times slower. vmap said: {first_line(error)}. Known causes: "
                "OrderedLogistic (give Categorical the differences of sigmoids), Wishart (give LKJ "
                "and scales), Stable, splines, branches on values, batch norm in training mode",
                stacklevel=4,
            )
            return False
        return True

    def _site_to_blame(self, q: Tensor) -> str:
        """Names the first site that vmap cannot follow, or the last one that it could."""
        scored, unchecked = _Scored(), pyro.validation_enabled(is_validate=False)
        with suppress(Exception), unchecked, torch.no_grad(), scored:
            self.over_rows(self._potential_under_grad, q)
        if scored.refused is not None:
            return f" at site {scored.refused!r}"
        return f" after site {scored.last!r}" if scored.last else ""

    def hold_flat(self) -> None:
        """Gives coordinates that the density does not depend on a standard normal of their own.

        Chains would drift along them for ever, and tune the trajectories of all others; this
        changes no other coordinate.
        """
        flat = self._find_flat()
        if flat is None:
            return
        sites = [name for name, part in self.split(flat).items() if bool(part.any())]
        warnings.warn(
            f"{self.name}: the density does not depend on some entries of {', '.join(sites)} "
            "(masked out?): they are drawn from a standard normal on the unconstrained space, "
            "which changes nothing else",
            stacklevel=5,
        )
        self._flat = flat.nonzero()[:, 0]

    def _find_flat(self) -> Tensor | None:
        """Marks coordinates without slope near and far, ``(D,)``, if there are any."""
        with rng_preserved(), pyro.validation_enabled(is_validate=False):
            near = self.draw_start(self.num_rows(4))
            try:
                places = [self.potential_and_grad(k * near)[1] for k in (0.1, 1.0, 5.0, 25.0)]
            except torch.linalg.LinAlgError:
                return None
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                places = [torch.zeros_like(near)]
        flat = (torch.cat(places) == 0).all(0)
        return flat if bool(flat.any()) else None

    @torch.no_grad()
    def constrain(self, q: Tensor) -> Values:
        """Returns the sites' values on their supports."""
        return self.on_support(q)

    def on_support(self, q: Tensor) -> Values:
        """Returns the sites' values on their supports, with gradients."""
        values = self.split(q)
        return {
            site: self._transforms[site].inv(u) if site in self._transforms else u
            for site, u in values.items()
        }

    @torch.no_grad()
    def position_of(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns positions ``lead + (D,)`` for values of the sites on their supports."""
        ways = self._transforms
        return self.join({n: ways[n](v) if n in ways else v for n, v in values.items()})

    def with_volumes(self, free: Values) -> tuple[Values, Values]:
        """Returns the values on their supports, and logs of the volumes that the way there adds.

        Differentiable; the logs have the shape of each site's batch or of its values.
        """
        values, volumes = dict(free), {}
        for site, transform in self._transforms.items():
            values[site] = transform.inv(free[site])
            volumes[site] = -transform.log_abs_det_jacobian(values[site], free[site])
        return values, volumes

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns positions for unconstrained values by site.

        Raises:
            ValueError: If a name is missing or unknown, or a shape does not fit.
        """
        check_names(values, self._shapes.keys())
        parts = []
        for site, shape in self._shapes.items():
            u = values[site]
            parts.append(u.reshape(lead_of(site, u, shape) + (-1,)))
        return torch.cat(parts, -1)

    def draw_start(self, num_chains: int) -> Tensor:
        """Draws uniformly from (-2, 2) in every unconstrained coordinate, as Stan and Pyro do."""
        q = torch.rand(num_chains, self.dim, dtype=self.dtype, device=self.device)
        return 4.0 * q - 2.0


class _Scored(poutine.messenger.Messenger):
    """Scores every site as it is met, and remembers the first one that cannot be."""

    refused: str | None = None
    last: str | None = None

    def _pyro_post_sample(self, msg: Any) -> None:
        try:
            msg["fn"].log_prob(msg["value"])
        except Exception:
            self.refused = self.refused or msg["name"]
            raise
        self.last = msg["name"]


def _check_data(trace: Any) -> None:
    """Raises if an EBM's data lie off its support, with validation off as well, or count twice."""
    for name in trace.observation_nodes:
        site = trace.nodes[name]
        law = unwrap(site["fn"])
        if law is not None:
            check_counted_once(site)
            mask = mask_of(site["fn"], site["mask"])
            check_observed(name, law.support, site["value"].detach(), mask)


class SetUp(NamedTuple):
    """A model made ready for a run: the arguments of :class:`ModelTarget`."""

    potential_fn: Potential
    like: Mapping[str, Tensor]
    transforms: Mapping[str, Transform]
    name: str
    each: EachChain | None


def target_of_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    initial_params: Mapping[str, Tensor] | None = None,
) -> ModelTarget:
    """Returns the target of a Pyro model with these arguments.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        initial_params: As for :func:`set_up`.

    Raises:
        MissingNormalizerError: If a latent would be inferred through an EBM without its log Z.
        ValueError: If a site cannot be sampled; the message names it.
        NonFiniteEnergyError: If there is nowhere to start.
    """
    target = ModelTarget(*set_up(model, args, kwargs, initial_params=initial_params))
    target.hold_flat()
    return target


def set_up(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    initial_params: Mapping[str, Tensor] | None = None,
    each: EachChain | None = None,
    name: str | None = None,
) -> SetUp:
    """Returns what a target of a Pyro model is made of, once nothing stands against it.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        initial_params: The run's starting values, unconstrained, ``(num_chains, ...)`` by site: the
            model is first run at those of the first chain. Whether its density is finite there is
            asked where the chains start.
        each: What gives every chain its data, where the model is a handler around it.
        name: What messages call it, where it is a handler around what users know.

    Raises:
        MissingNormalizerError: If a latent would be inferred through an EBM without its log Z.
        ValueError: If a site cannot be sampled; the message names it.
        NonFiniteEnergyError: If there is nowhere to start.
    """
    each = model if isinstance(model, EachChain) else each
    if each is not None:
        each.check(args, kwargs)
    start = first_chain(initial_params)
    try:
        checks = pyro.validation_enabled(is_validate=False)
        with checks, poutine.block(), torch.enable_grad(), vmap_safe_operations():
            params, potential_fn, transforms, trace = initialize_model(
                VmapSafe()(model),
                args,
                kwargs,
                init_strategy=AtValues(start),
                initial_params=start or None,  # no search for others
            )
            if start:
                params = {n: to(trace.nodes[n]["value"].detach()) for n, to in transforms.items()}
    except MissingNormalizerError:
        raise
    except Exception as error:  # Pyro and models fail in many ways
        better = explained(error, model, args, kwargs)
        if better is error:
            raise
        raise better from error
    check_fixed_supports(model, args, kwargs)
    if has_energies(trace):
        at = {name: to.inv(params[name]) for name, to in transforms.items()}
        check_structure(model, args, kwargs, at=at)
        _check_data(trace)
    return SetUp(potential_fn, params, transforms, name or name_of(model), each)
