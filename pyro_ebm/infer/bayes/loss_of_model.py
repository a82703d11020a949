r"""The loss of a Pyro model as a function of its latents' unconstrained coordinates.

A potential :math:`U(q) = w L(q) + R(q)` of MCMC over a surrogate is a loss over rows of data and
the rest: prior, Jacobian and sites with a likelihood. Calibration needs the two apart, the loss row
by row, and the loss at other data. All derivatives are by reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.layers import unvalidated
from pyro_ebm.infer.bayes.damped_newton import MAX_STEPS, damped_newton, derivatives, scales_of
from pyro_ebm.infer.bayes.independent_units import units_of
from pyro_ebm.infer.bayes.prior_runs import NUM_DRAWS, prior_runs
from pyro_ebm.infer.scoring import trace_checks
from pyro_ebm.mcmc.targets.model_target import ModelTarget
from pyro_ebm.mcmc.targets.vmap_safe import vmap_safe_operations
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.poutine.surrogate import (
    SurrogateMessenger,
    SurrogateObjective,
    surrogate_of,
)
from pyro_ebm.poutine.whole_data import WHEN_FROZEN, check_site_whole

MAX_NUMBERS = 2**24  # of neighbouring events at once, over simulated data sets


class Minimum(NamedTuple):
    """Where a loss is lowest.

    Args:
        at: Unconstrained position, ``(D,)``.
        felt: Indices of the coordinates that the loss depends on, ``(F,)``.
    """

    at: Tensor
    felt: Tensor


class ModelLoss:
    """Loss and potential of a model whose observed EBM sites are scored by a frozen objective.

    Args:
        target: The bound target of MCMC over ``surrogate(model, objective)``.
        model: The model.
        objective: The frozen objective.
        arguments: Positional and keyword arguments of the model.
    """

    def __init__(
        self,
        target: ModelTarget,
        model: Callable[..., Any],
        objective: SurrogateObjective,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self.target, self.objective = target, objective
        self._model, (self._args, self._kwargs) = model, arguments
        self.degree = degree_of(objective)
        found = self.sites(target.draw_start(1)[0])
        self.counts = torch.cat([_mask_of(site).reshape(-1) for site in found.values()])
        units = units_of(
            found, {name: surrogate_of(s["fn"]).batch_shape for name, s in found.items()}
        )
        self.units = None if units is None else units.counting(self.counts.cpu())
        self._check(found)

    def _check(self, found: Mapping[str, Any]) -> None:
        """Lets the objective look at every site once, with values."""
        trace_checks.has_sites(found)
        look = getattr(getattr(self.objective, "objective", self.objective), "check", None)
        for name, site in found.items():
            check_site_whole(site, WHEN_FROZEN)
            if look is not None:
                scored = surrogate_of(site["fn"])
                look(name, scored.p, scored.without_padding(site["value"]))

    def sites(self, q: Tensor, data: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Returns the scored sites of a run of the model at ``q``, ``(D,)``, by name.

        Args:
            q: Unconstrained position.
            data: Values to put in place of the sites' own.
        """
        handler = SurrogateMessenger(self.objective)
        values = self.target.on_support(q)
        run = poutine.trace(poutine.condition(handler(self._model), values))
        unchecked = pyro.validation_enabled(is_validate=False)
        with rng_preserved(), unchecked, poutine.block(), _Replaced(data or {}):
            nodes = run.get_trace(*self._args, **self._kwargs).nodes
        return {name: nodes[name] for name in handler.used}

    def rows(self, q: Tensor, data: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the loss of every row of all sites, weighted and scaled; 0 where masked out."""
        with vmap_safe_operations():
            losses = [_rows_of(site) for site in self.sites(q, data).values()]
        return torch.cat([loss.reshape(-1) for loss in losses])

    def scaled_sites(self, q: Tensor) -> list[str]:
        """Returns the names of sites that ``poutine.scale`` multiplies, at ``q``, ``(D,)``."""
        sites = self.sites(q).items()
        return [name for name, site in sites if bool((torch.as_tensor(site["scale"]) != 1).any())]

    def potential(self, q: Tensor) -> Tensor:
        """Returns the whole potential at ``q``, ``(D,)``, a 0-d tensor in nats."""
        return self._potentials(q.unsqueeze(0))[0]

    def _potentials(self, q: Tensor) -> Tensor:
        with pyro.validation_enabled(is_validate=False):
            return self.target.potential(q)

    def row_gradients(self, q: Tensor) -> Tensor:
        """Returns the gradient of the loss of every row that counts, ``(N, D)``, in float64.

        By reverse mode twice, D passes in all: the pull-back is linear in its cotangents.
        """
        rows, pull_back = torch.func.vjp(self.rows, q)[:2]
        jacobian = torch.func.jacrev(lambda v: pull_back(v)[0])(torch.zeros_like(rows))
        return jacobian.T.detach()[self.counts].double()

    def hessians(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the second derivatives of the potential and of the loss alone, ``(D, D)``.

        In float64, as the gradients are: data may be so beside latents in float32.
        """
        whole, alone = (derivatives(value, q)[0] for value in (self.potential, self._total))
        return whole.double(), alone.double()

    def simulated_gradients(self, q: Tensor, data: Mapping[str, Tensor]) -> Tensor:
        """Returns the gradient of the loss at R data sets, ``(R, D)``, in float64.

        Args:
            q: Unconstrained position, ``(D,)``.
            data: Site name to values, ``(R,) + batch + event``.
        """
        largest = max(value[0].numel() for value in data.values())
        gradient = torch.func.grad(lambda at, values: self.rows(at, values).sum())
        chunk = max(1, MAX_NUMBERS // (8 * largest**2))
        over_data = torch.vmap(gradient, in_dims=(None, 0), chunk_size=chunk)
        return over_data(q, dict(data)).detach().double()

    def mode(self) -> Tensor:
        """Returns a minimum of the potential, ``(D,)``, by damped Newton steps from the best start.

        Raises:
            ValueError: If there is none, as where the data push a parameter to its boundary.
        """
        starts = torch.cat(self._starts())
        q = _best_of(starts, self._potentials(starts))

        def rounding(at: Tensor) -> Tensor:
            return (1.0 + self.potential(at).detach().abs()) * _rounding(at)

        mode = damped_newton(self.potential, q, rounding)
        if mode is not None:
            return mode
        raise ValueError(
            f"{self.target!r}: no posterior mode was found in {MAX_STEPS} Newton steps on "
            "the unconstrained space, and calibration is about the mode. Is a parameter pushed to "
            "its boundary, a prior improper, or a scale shared by latents that could all be equal "
            "(write them as loc + scale * z, z of Normal(0, 1), or give the scale a prior that "
            "excludes 0)? generalized_posterior(..., calibration='none') draws without a mode"
        )

    def own_minimum(self) -> Minimum | None:
        """Returns a minimum of the loss alone; ``None`` if it has none.

        Coordinates and directions along which no row's loss changes are left where the best start
        has them. Where the loss falls for ever, its curvature dies away under Newton steps: then
        there is none.
        """
        uniform, drawn = self._starts()
        starts, felt = torch.cat([uniform, drawn]), self.felt(uniform)
        q = _best_of(starts, torch.stack([self._total(start).detach() for start in starts]))

        def full(z: Tensor) -> Tensor:
            return q.index_put((felt,), z)

        def total(z: Tensor) -> Tensor:
            return self._total(full(z))

        def rounding(z: Tensor) -> Tensor:
            return self._size(full(z)) * _rounding(z)

        found = damped_newton(total, q[felt], rounding, flat=flatness(q)) if len(felt) else None
        if found is None:
            return None
        hessian, gradient = derivatives(total, found)
        step = -gradient / scales_of(hessian) ** 2
        further = derivatives(total, found + step)[0]
        if bool((further.diagonal() < 0.5 * hessian.diagonal()).any()):
            return None
        return Minimum(full(found), felt)

    def _starts(self) -> tuple[Tensor, Tensor]:
        """Positions on either side of zero, and draws of the prior, which may know the unit.

        Each are ``(S, D)``.
        """
        uniform = self.target.draw_start(NUM_DRAWS)
        model = SurrogateMessenger(self.objective)(self._model)
        runs = prior_runs(model, self._args, self._kwargs)
        names = self.target.split(uniform)
        drawn = {name: torch.stack([run.nodes[name]["value"] for run in runs]) for name in names}
        return uniform, self.target.position_of(drawn).to(uniform)

    def felt(self, q: Tensor) -> Tensor:
        """Returns the coordinates that the loss depends on beyond its rounding, ``(F,)`` indices.

        Args:
            q: Positions to look at, ``(S, D)``.
        """
        gradients = torch.stack([torch.func.grad(self._total)(at).detach() for at in q])
        changes = torch.where(gradients.isfinite(), gradients.abs(), torch.inf) * (1 + q.abs())
        sizes = torch.stack([self._size(at) for at in q])
        sizes = torch.where(sizes.isfinite(), sizes, torch.inf)
        return (changes > sizes[:, None] * _rounding(q)).any(0).nonzero()[:, 0]

    def _total(self, q: Tensor) -> Tensor:
        return self.rows(q).sum()

    def _size(self, q: Tensor) -> Tensor:
        """What the rounding of the total loss is relative to."""
        return self.rows(q).detach().abs().sum()


def law_of(site: Any) -> EnergyDistribution:
    """Returns the EBM at a scored site."""
    return surrogate_of(site["fn"]).p


def degree_of(objective: Any) -> int:
    """Returns in how many places a row enters an objective's total loss: 2 for sums over pairs."""
    inner = getattr(objective, "objective", objective)
    return getattr(inner, "degree", 1)


def _mask_of(site: Any) -> Tensor:
    """Which rows of a scored site count, in the batch shape of its EBM."""
    scored = surrogate_of(site["fn"])
    if scored.mask is None:
        return torch.ones(scored.batch_shape, dtype=torch.bool, device=site["value"].device)
    return scored.mask.expand(scored.batch_shape)


def _rows_of(site: Any) -> Tensor:
    scored = unvalidated(surrogate_of(site["fn"]))
    loss = -site["scale"] * scored.log_prob(site["value"])
    return loss if scored.mask is None else torch.where(scored.mask, loss, 0.0)


class _Replaced(Messenger):
    """Puts other data at observed sites."""

    def __init__(self, data: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.data = data

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.data:
            msg["value"], msg["is_observed"] = self.data[msg["name"]], True


def flatness(q: Tensor) -> float:
    """Returns the curvature, of one along every coordinate, below which a loss counts as flat."""
    return float(torch.finfo(q.dtype).eps ** 0.5)


def _rounding(q: Tensor) -> float:
    return float(torch.finfo(q.dtype).eps ** 0.75)


def _best_of(q: Tensor, values: Tensor) -> Tensor:
    return q[torch.where(values.isfinite(), values.detach(), torch.inf).argmin()]
