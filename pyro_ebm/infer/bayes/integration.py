r"""Finding nodes for log Z that hold wherever a posterior has mass.

Where the mass of a law lies is found for one :math:`\theta` at a time
(:func:`~pyro_ebm.normalizers.find_box`), and around the data, where that does not see what they
lie in (:mod:`pyro_ebm.infer.bayes.witnesses`). The search begins with draws of the prior, keeps
those of high posterior density, puts a box around the boxes of all of them with the smallest of
their steps, and draws from the posterior by short chains of HMC. A box is made anew for these
draws, half as far out again and wherever between them the old one did not hold: where a box does
not hold no chain comes, so that draws alone say nothing of a gap among them. The search ends when
old and new boxes hold at all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.distributions.gaussian_base import is_gaussian
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.infer.bayes.data_structure import SiteStructure
from pyro_ebm.infer.bayes.enumerated import Enumerated
from pyro_ebm.infer.bayes.integrated import MAX_ERROR, Integrated, OnBase, OnBox, Rule
from pyro_ebm.infer.bayes.witnesses import witnesses_of
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.exchange.exchange_target import UnnormalizedSites
from pyro_ebm.mcmc.targets.model_target import ModelTarget, target_of_model
from pyro_ebm.normalizers.held_nodes import MAX_DIM
from pyro_ebm.normalizers.laws import shared_law
from pyro_ebm.normalizers.quadrature import Box, find_box
from pyro_ebm.ops.log_space import NEGLIGIBLE
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.poutine import surrogate

_NUM_STARTS = 10  # from the prior, and as many about the origin of the unconstrained space
_WORSE = 30.0  # nats below the best start at which one is left out
_PILOT_DRAWS, _PILOT_STEPS, _PILOT_CHAINS = 10, 60, 32
_MAX_ROUNDS = 8
_BEYOND = 1.5  # how far out of the draws' centre the rule must hold, relative to them
_SAFETY = 0.1  # of the error that is let pass: what boxes are made for
_MAX_BOXES = 12  # of positions that one box is put around
_STEPS_BETWEEN = 12  # on the way from the middle draw to one further out
_FIRST_QUARTER = 4  # of the nodes along a dim

Laws = dict[str, EnergyDistribution]


@dataclass(frozen=True)
class Integrals:
    """Rules that hold where a posterior has its mass.

    Args:
        objective: Scores the sites by them.
        starts: Positions of the posterior, ``(S, D)``.
        search: What found them.
    """

    objective: Integrated
    starts: Tensor
    search: Search

    def begin(self, num_chains: int) -> dict[str, Tensor]:
        """Returns unconstrained values by latent for chains to start from."""
        chosen = torch.randint(len(self.starts), (num_chains,))
        return self.search.target.split(self.starts[chosen])

    def hold_beyond(self, q: Tensor) -> bool:
        """Whether the rules hold around draws ``(S, D)`` too."""
        return not len(self.search.failing(self.objective, _stretched(q)))

    def gaps_among(self, q: Tensor) -> Tensor:
        """Returns positions between draws ``(S, D)`` at which the rules do not hold, ``(K, D)``."""
        return self.search.failing(self.objective, _between(q))


def integrals_of(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: Sequence[SiteStructure],
    *,
    max_nodes: int,
    max_dim: int = MAX_DIM,
) -> Integrals | None:
    """Returns rules for the continuous sites of a model; ``None`` if they cannot be had.

    Args:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        sites: Its sites without log Z; those with finitely many states are summed.
        max_nodes: Energies in the integrals for log Z of one draw at most.
        max_dim: Dims of an integral at most; with more of them nothing is looked at.
    """
    if any(s.is_continuous and s.dim > max_dim for s in sites):
        return None
    search = Search(model, args, kwargs, sites, max_nodes)
    with rng_preserved():
        return search.run()


class Search:
    """The search for rules; see the module.

    Args:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        sites: Its sites without log Z.
        max_nodes: Energies in the integrals for log Z of one draw at most.
    """

    target: ModelTarget

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sites: Sequence[SiteStructure],
        max_nodes: int,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.sites = {site.name: site for site in sites if site.is_continuous}
        self.max_nodes = max_nodes
        self.enumerated = Enumerated.of(sites)
        self.data = {name: _data_of(site) for name, site in self.sites.items()}
        self._boxes: dict[tuple[str, tuple[float, ...]], Box | None] = {}
        self.error = {
            name: max(MAX_ERROR / max(site.num_rows, 1), 64 * torch.finfo(site.value.dtype).eps)
            for name, site in self.sites.items()
        }

    def run(self) -> Integrals | None:
        """Returns rules that hold, or ``None`` if there are none of so few nodes."""
        self.target = target_of_model(
            surrogate(self.model, UnnormalizedSites()), self.args, self.kwargs
        )
        q = self._starts()
        if q is None:
            return None
        found = self._objective(q)
        if found is None:  # too far apart for one box
            q = q[:1]
            found = self._objective(q)
        for _ in range(_MAX_ROUNDS):
            if found is None:
                return None
            before = Integrals(found, q, self)
            q = self._drawn(before)
            gaps = before.gaps_among(q)[:_MAX_BOXES]
            found = self._objective(torch.cat([_spread(_stretched(q)), gaps]))
            found = found or self._objective(torch.cat([_spread(q), gaps]))
            last = Integrals(found or before.objective, q, self)
            if before.hold_beyond(q) and not len(gaps) and not len(last.gaps_among(q)):
                return last
        return None

    # --- positions

    def _starts(self) -> Tensor | None:
        """Positions of high posterior density among draws of the prior and others, best first."""
        q = torch.cat([self._of_prior(), self.target.draw_start(_NUM_STARTS)])
        scores = torch.tensor([self._score(row) for row in q])
        order = scores.argsort(descending=True).to(q.device)
        kept = int((scores >= scores.max() - _WORSE).sum())
        return q[order[:kept]] if bool(scores.max() > -torch.inf) else None

    def _of_prior(self) -> Tensor:
        rows = []
        for _ in range(_NUM_STARTS):
            nodes = self._trace(self.model).nodes
            names = self.target.split(torch.zeros(self.target.dim)).keys()
            rows.append(self.target.position_of({name: nodes[name]["value"] for name in names}))
        return torch.stack(rows)

    def _score(self, q: Tensor) -> float:
        """The log density at a position, with rules made for it alone."""
        found = self._objective(q[None])
        if found is None:
            return -torch.inf
        trace = self._trace(surrogate(self.model, found), self.target.constrain(q))
        score = float(trace.log_prob_sum())
        return score if score == score else -torch.inf

    def _drawn(self, at: Integrals) -> Tensor:
        """Draws of short chains, ``(S, D)``."""
        kernel = HMC(surrogate(self.model, at.objective))
        mcmc = MCMC(
            kernel, _PILOT_DRAWS, _PILOT_STEPS, num_chains=_PILOT_CHAINS, disable_progbar=True
        )
        mcmc.run(*self.args, initial_params=at.begin(_PILOT_CHAINS), **self.kwargs)
        return mcmc.positions()[1].flatten(0, 1)

    # --- rules

    def failing(self, rules: Integrated, q: Tensor) -> Tensor:
        """Returns those of positions ``(S, D)`` at which rules do not hold."""
        held = torch.tensor([rules.holds(self.laws(row)) for row in q], device=q.device)
        return q[~held]

    def laws(self, q: Tensor) -> Laws:
        """Returns the laws of the sites at a position ``(D,)``."""
        nodes = self._trace(self.model, self.target.constrain(q)).nodes
        found = {name: unwrap(nodes[name]["fn"]) for name in self.sites}
        return {name: law for name, law in found.items() if law is not None}

    def _trace(self, model: Callable[..., Any], values: Mapping[str, Tensor] | None = None) -> Any:
        with torch.no_grad(), poutine.block():
            given = poutine.condition(model, dict(values or {}))
            return poutine.trace(given).get_trace(*self.args, **self.kwargs)

    def _objective(self, q: Tensor) -> Integrated | None:
        """Rules for all positions of ``(S, D)`` at which there are any."""
        rules = {name: self._rule(name, q) for name in self.sites}
        found = {name: rule for name, rule in rules.items() if rule is not None}
        terms = sum(rule.num_nodes * self._num_laws(name) for name, rule in found.items())
        if len(found) < len(rules) or terms > self.max_nodes:
            return None
        return Integrated(found, self.error, self.enumerated)

    def _box(self, name: str, row: Tensor, law: EnergyDistribution) -> Box | None:
        """The box at one position, looked for once."""
        key = name, tuple(row.tolist())
        if key not in self._boxes:
            wanted = _SAFETY * self.error[name]
            site, data = self.sites[name], self.data[name]
            self._boxes[key] = _box_of(law, site, data, wanted, self.max_nodes)
        return self._boxes[key]

    def _num_laws(self, name: str) -> int:
        """How many laws the nodes are evaluated for."""
        site = self.sites[name]
        return 1 if site.shares_law else site.law.batch_shape.numel()

    def _rule(self, name: str, q: Tensor) -> Rule | None:
        """The nodes of a Gaussian base if they hold for all laws, or else a box for all."""
        site, wanted, data = self.sites[name], _SAFETY * self.error[name], self.data[name]
        laws = [self.laws(row)[name] for row in q]
        if is_gaussian(site.law.base):
            rule = OnBase(site.dim, is_shared=site.shares_law, data=data)
            if all(bool((rule(law)[1] <= wanted).all()) for law in laws):
                return rule
        boxes = [self._box(name, *at) for at in zip(q, laws, strict=True)]
        found = [box for box in boxes if box is not None]
        return OnBox(_around(found), site.shares_law, data) if found else None


@torch.no_grad()
def _box_of(
    law: EnergyDistribution,
    site: SiteStructure,
    data: Tensor | None,
    wanted: float,
    max_nodes: float,
) -> Box | None:
    """A box with as few nodes as hold for this law and see the data, in their dtype."""
    one = shared_law(law, site.value) if site.shares_law else law
    try:
        box = find_box(one, depth=NEGLIGIBLE, draws=data)
    except NonFiniteEnergyError:  # at these parameters Z is infinite, or there is no mass
        return None
    low, high, quarter = box.low.to(site.value), box.high.to(site.value), _FIRST_QUARTER
    while (4 * quarter + 1) ** len(low) <= max_nodes:
        box = Box(low, high, 4 * quarter + 1)
        if bool((OnBox(box, site.shares_law, data)(law)[1] <= wanted).all()):
            return box
        quarter = round(1.5 * quarter)
    return None


def _data_of(site: SiteStructure) -> Tensor | None:
    dims = len(site.law.event_shape)
    return witnesses_of(site.value, site.counts, event_dims=dims, is_shared=site.shares_law)


def _around(boxes: Iterable[Box]) -> Box:
    """The box around all, with the smallest of their steps in every dim."""
    boxes = list(boxes)
    low = torch.stack([box.low for box in boxes]).amin(0)
    high = torch.stack([box.high for box in boxes]).amax(0)
    steps = torch.stack([(box.high - box.low) / (box.num_nodes - 1) for box in boxes]).amin(0)
    return Box(low, high, 4 * int(((high - low) / steps / 4).amax().ceil()) + 1)


def _spread(q: Tensor) -> Tensor:
    """Those of positions ``(S, D)`` that lie furthest from each other, the middle one first."""
    tiny = torch.finfo(q.dtype).tiny  # coordinates that stand still are at no distance
    scaled = (q - q.mean(0)) / q.std(0).clamp_min(tiny)
    chosen = [int(scaled.norm(dim=1).argmin())]
    distance = torch.full_like(scaled[:, 0], torch.inf)
    for _ in range(min(_MAX_BOXES, len(q)) - 1):
        distance = torch.minimum(distance, (scaled - scaled[chosen[-1]]).norm(dim=1))
        chosen.append(int(distance.argmax()))
    return q[chosen]


def _between(q: Tensor) -> Tensor:
    """Positions on the ways from the middle one of ``(S, D)`` to those furthest from each other."""
    middle, *others = _spread(q)
    share = torch.linspace(0.0, 1.0, _STEPS_BETWEEN + 1, dtype=q.dtype, device=q.device)[1:, None]
    return torch.cat([middle[None], *(middle + share * (other - middle) for other in others)])


def _stretched(q: Tensor) -> Tensor:
    """Positions and others that lie further out, ``(2 S, D)``."""
    centre = q.mean(0)
    return torch.cat([q, centre + _BEYOND * (q - centre)])
