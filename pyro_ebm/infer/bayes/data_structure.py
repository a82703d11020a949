"""How the data of a model hang together: what decides by which way its posterior can be had.

An observed EBM site without log Z holds *independent rows* that share one law, rows that have laws
of their own by a covariate (*conditional*), groups with parameters of their own (*hierarchical*),
or *one dependent observation*, such as a lattice or a network, of which there is nothing to
resample. Runs of the model at draws of its prior tell: at one of them rows may look alike that are
not, as where the slope of a covariate is cut off at zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.distributions.layers import is_normalized, mask_of
from pyro_ebm.distributions.supports import check_observed
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.infer.bayes.prior_runs import prior_runs
from pyro_ebm.infer.scoring.conditional import depends_on_rows
from pyro_ebm.mcmc.exchange.group_terms import turn_of
from pyro_ebm.mcmc.targets.explain import explained
from pyro_ebm.normalizers.exact import States
from pyro_ebm.normalizers.held_nodes import MAX_DIM
from pyro_ebm.ops.constraints import base_measure, finite_values, plain
from pyro_ebm.ops.spaces import UnconstrainedSpace
from pyro_ebm.poutine.whole_data import check_counted_once, check_whole
from pyro_ebm.typing import BaseMeasure


@dataclass(frozen=True)
class SiteStructure:
    """An observed EBM site.

    Args:
        name: The site.
        value: Its data.
        law: Its distribution in the first run of the model, without plates.
        counts: Which of its rows count, of the law's batch shape.
        is_conditional: Whether rows have laws of their own; not looked at where log Z is known.
        plates: Names of its plates that hold latents too, innermost first.
    """

    name: str
    value: Tensor
    law: EnergyDistribution
    counts: Tensor
    is_conditional: bool
    plates: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """How many values of the event it holds that count."""
        return int(self.counts.sum())

    @property
    def family(self) -> ExponentialFamily | None:
        """The energy if it is linear in its parameters and stands on no base."""
        energy = self.law.energy_function
        return energy if isinstance(energy, ExponentialFamily) and self.law.base is None else None

    @property
    def can_be_exchanged(self) -> bool:
        """Whether auxiliary data can be drawn: the energy is a family with a sampler or kernel."""
        return self.family is not None and (self.law.energy_draws_exactly or self.law.energy_sweeps)

    @property
    def has_noise(self) -> bool:
        """Whether there is a noise density for it.

        Its base, a Gaussian on the reals, or the uniform law on a sphere.
        """
        is_real = plain(self.law.support) is constraints.real
        return self.law.base is not None or is_real or self.measure == "surface"

    @property
    def kind(self) -> str:
        """One of hierarchical, conditional, one observation, independent rows."""
        if self.plates:
            return "hierarchical"
        if self.is_conditional:
            return "conditional"
        return "one observation" if self.num_rows == 1 else "independent rows"

    @property
    def num_states(self) -> float:
        """How many values the event can have; infinite without finite support."""
        states = States.finite(self.law)
        return inf if states is None else states.number

    @property
    def num_terms(self) -> float:
        """How many energies the sum for log Z of all rows has; infinite without finite support."""
        states = States.finite(self.law)
        return inf if states is None else states.number * self._num_sums(states)

    def _num_sums(self, states: States) -> int:
        """One for rows known to share a law."""
        if self.shares_law:
            return 1
        if self.family is None:
            return self.law.batch_shape.numel()
        return self.family(states[torch.zeros(1, dtype=torch.long)]).numel()

    @property
    def broadcasts(self) -> bool:
        """Whether one value of the event may be given to the energies of all rows at once."""
        return self.shares_law or self.family is not None

    @property
    def shares_law(self) -> bool:
        """Whether one log Z is that of all rows."""
        return not self.is_conditional

    @property
    def can_be_integrated(self) -> bool:
        """Whether log Z could be an integral: the event is continuous and of few dims."""
        return self.is_continuous and self.dim <= MAX_DIM

    @property
    def is_continuous(self) -> bool:
        """Whether the site has a density, of which slopes can be taken."""
        return self.measure == "lebesgue"

    @property
    def measure(self) -> BaseMeasure:
        """What densities of the site refer to."""
        return base_measure(self.law.support)

    @property
    def dim(self) -> int:
        """Dims of an event: K - 1 of K parts of a whole, all elements where none is known."""
        support, shape = self.law.support, self.law.event_shape
        if not self.is_continuous:
            return shape.numel()
        try:
            return UnconstrainedSpace.of(support, shape).size
        except NotImplementedError:  # no bijection from the reals
            return shape.numel()


@dataclass(frozen=True)
class DataStructure:
    """The observed EBM sites of a model, those whose log Z is missing first.

    Args:
        sites: The sites; none where every log Z is known.
        known: The other observed EBM sites.
        plates: Names of the plates that hold latents.
        uneven: Those that are loops whose turns hold latents of different sizes.
    """

    sites: tuple[SiteStructure, ...]
    known: tuple[SiteStructure, ...] = ()
    plates: frozenset[str] = frozenset()
    uneven: frozenset[str] = frozenset()

    @property
    def observed(self) -> tuple[SiteStructure, ...]:
        """All observed EBM sites."""
        return self.sites + self.known

    def as_conditional(self) -> DataStructure:
        """Returns the structure in which rows of all sites without log Z have laws of their own."""
        return replace(self, sites=tuple(replace(s, is_conditional=True) for s in self.sites))

    @property
    def groups(self) -> str | None:
        """The plate of groups that have latents of their own, if all sites stand in one."""
        shared = [p for p in self.sites[0].plates if all(p in s.plates for s in self.sites)]
        return next((p for p in shared if p not in self.uneven), None)

    @property
    def indexed(self) -> tuple[str, ...]:
        """Plates of latents in which no site without log Z stands: rows may pick from them."""
        inside = {plate for site in self.sites for plate in site.plates}
        return tuple(sorted(self.plates - inside))

    @property
    def is_integral(self) -> bool:
        """Whether log Z of a site could be an integral, of a few dims."""
        return any(site.can_be_integrated for site in self.sites)

    @property
    def kind(self) -> str:
        """The first of the sites' kinds in this order: hierarchical, conditional, one, rows."""
        kinds = {site.kind for site in self.sites}
        order = ("hierarchical", "conditional", "one observation", "independent rows")
        return next(kind for kind in order if kind in kinds)


def data_structure(model: Callable[..., Any], *args: Any, **kwargs: Any) -> DataStructure:
    """Returns how a model's data hang together.

    Args:
        model: A Pyro model.
        *args: Its arguments, with the full data.
        **kwargs: Its keyword arguments.

    Raises:
        TypeError: If it is no model, data are no tensor, or those on a continuous support are whole
            numbers.
        ValueError: If it observes no EBM, data lie outside of their support, or a plate takes some
            of its rows only.
        NotImplementedError: If log Z is unknown and rows have integer intervals of their own.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm.energies import ExponentialRandomGraph
        >>> from pyro_ebm.energies.graph_statistics import Edges, Triangles
        >>> def model(graph):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     energy = ExponentialRandomGraph(theta, 16, [Edges(), Triangles()])
        ...     pyro.sample("graph", EnergyDistribution(energy), obs=graph)
        >>> data_structure(model, torch.zeros(120)).kind
        'one observation'
    """
    check_model(model, "a posterior")
    runs = _traced(model, args, kwargs)
    trace = runs[0]
    check_whole(trace)
    ebms = observed_ebms(trace)
    latents = [s for s in _sites(trace) if not s["is_observed"]]
    of_latents = frozenset(f.name for s in latents for f in s["cond_indep_stack"])
    for site in ebms:
        _check_tensor(site)
        check_counted_once(site)
        mask = mask_of(site["fn"], site["mask"])
        check_observed(site["name"], _law_of(site).support, site["value"], mask)
        _check_floating(site)
        _check_states(site)
    missing, known = (
        tuple(_structure(s, of_latents, runs) for s in ebms if _law_of(s).is_normalized is is_known)
        for is_known in (False, True)
    )
    return DataStructure(missing, known, of_latents, _uneven_loops(latents))


def _traced(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Trace]:
    try:
        return prior_runs(model, args, kwargs)
    except NotImplementedError as error:  # of a prior that cannot be drawn
        raise explained(error, model, args, kwargs) from error


def check_model(model: Any, what: str) -> None:
    """Raises ``TypeError`` if this is no Pyro model.

    Args:
        model: What was given for it.
        what: What needs it, as the beginning of a sentence.
    """
    if not callable(model) or isinstance(model, Distribution):
        raise TypeError(
            f"{what} is over the latents of a Pyro model, got {type(model).__name__}: put the "
            "distribution at an observed site of a function that draws its parameters, def "
            "model(x): a = pyro.sample(...); pyro.sample('x', EnergyDistribution(...), obs=x)"
        )


def observed_ebms(run: Trace) -> list[Any]:
    """Returns the observed EBM sites of a run of a model.

    Args:
        run: The run.

    Raises:
        ValueError: If there are none; the sentence says what samples the model then.
    """
    sites = _sites(run)
    ebms = [s for s in sites if s["is_observed"] and unwrap(s["fn"]) is not None]
    if not ebms:
        raise ValueError(_without_observed(sites))
    return ebms


def _sites(run: Trace) -> list[Any]:
    sites = run.nodes.values()
    return [s for s in sites if s["type"] == "sample" and not site_is_subsample(s)]


def _without_observed(sites: list[Any]) -> str:
    """A sentence on a model that observes no EBM."""
    mixed = [s for s in sites if s["is_observed"] and not is_normalized(s["fn"])]
    if mixed:
        return _of_mixture(mixed[0])
    found = ((site["name"], unwrap(site["fn"])) for site in sites)
    laws = {name: law for name, law in found if law is not None}
    hidden = [name for name, law in laws.items() if _is_hidden_field(law)]
    if hidden:
        return _of_hidden_fields(hidden)
    latent = [name for name, law in laws.items() if not law.is_normalized]
    if not latent:
        return "the model observes no EBM: any kernel samples it, as pyro.infer.NUTS or mcmc.HMC"
    return (
        f"the model observes no EBM, and its EBM sites {latent} are latent with log Z unknown: if "
        "their energies depend on no other latent, mcmc.HMC samples them as they are; else log Z "
        "is part of the density of those latents, give the distribution a log_normalizer"
    )


def _is_hidden_field(law: EnergyDistribution) -> bool:
    """Whether a latent EBM has states that Pyro cannot sum out."""
    return base_measure(law.support) == "counting" and not law.has_enumerate_support


def _of_hidden_fields(names: list[str]) -> str:
    """A sentence on latent EBMs without slopes."""
    return (
        f"the model observes no EBM, and its EBM sites {names} are latent where no gradient leads "
        "from state to state, which no method here samples together with other latents. Where "
        "there are few states s, sum them out: pyro.factor('y', torch.logsumexp(ebm.log_prob(s) + "
        "likelihood.log_prob(y), 0)) with all of them in front, log Z known, and mcmc.HMC for the "
        "rest; else draw in turns, s by sweeps of your own and the rest by posterior() given s"
    )


def _of_mixture(site: Any) -> str:
    """A sentence on a distribution that adds the density of an EBM to another."""
    name, kind = site["name"], type(site["fn"]).__name__
    return (
        f"site {name!r}: {kind} adds the density of an EBM to another, and log Z is had of sites "
        "that are EBMs only. Draw which of them it is, and mask: for zeros too many, inside the "
        "plate, absent = pyro.sample('absent', dist.Bernoulli(gate), infer={'enumerate': "
        f"'parallel'}}), pyro.sample({name!r}, ebm.mask(absent == 0), obs=y), pyro.sample('zero', "
        "dist.Delta(torch.zeros(())).mask(absent == 1), obs=y)"
    )


def _check_floating(site: Any) -> None:
    support, x = _law_of(site).support, site["value"]
    if base_measure(support) == "lebesgue" and not x.is_floating_point():
        raise TypeError(
            f"EBM site {site['name']!r} has a density on {plain(support)}, so that its data must "
            f"be floating point, got {x.dtype}: call x.double() if they are measurements, or give "
            "the distribution a discrete support"
        )


def _check_tensor(site: Any) -> None:
    if not isinstance(site["value"], Tensor):
        raise TypeError(
            f"the data of EBM site {site['name']!r} must be a tensor, got "
            f"{type(site['value']).__name__}: call torch.as_tensor on what the model is given"
        )


def _check_states(site: Any) -> None:
    support = plain(_law_of(site).support)
    has_own = isinstance(support, constraints.integer_interval) and finite_values(support) is None
    if has_own and not _law_of(site).is_normalized:
        raise NotImplementedError(
            f"EBM site {site['name']!r} lives on {support}, with bounds of their own for its "
            "elements, and sums for log Z take one list of states: give integer_interval(lowest, "
            "highest) for all, and an energy of math.inf beyond the bounds, as by torch.where(x <= "
            "upper, energy, math.inf)"
        )


def _uneven_loops(latents: list[Any]) -> frozenset[str]:
    """Loops whose turns do not hold as many numbers each."""
    turns: dict[str, list[int]] = {}
    for site in latents:
        for frame in site["cond_indep_stack"]:
            if frame.dim is None:
                counts = turns.setdefault(frame.name, [0] * frame.size)
                counts[turn_of(frame)] += site["value"].numel()
    return frozenset(name for name, counts in turns.items() if len(set(counts)) > 1)


def _structure(site: Any, of_latents: frozenset[str], runs: list[Any]) -> SiteStructure:
    law = _law_of(site)
    x = law.broadcast_value(site["value"])
    mask = mask_of(site["fn"], site["mask"])
    frames = sorted(site["cond_indep_stack"], key=lambda f: -(f.dim or 0))
    return SiteStructure(
        name=site["name"],
        value=x,
        law=law,
        counts=torch.as_tensor(mask, device=x.device).expand(law.batch_shape),
        is_conditional=law.conditional is True or _have_own_laws(site["name"], x, runs),
        plates=tuple(f.name for f in frames if f.name in of_latents),
    )


@torch.no_grad()
def _have_own_laws(name: str, x: Tensor, runs: list[Any]) -> bool:
    """Whether rows of a site without log Z have laws of their own in some run."""
    laws = [_law_of(run.nodes[name]) for run in runs if name in run.nodes]
    return any(not law.is_normalized and _has_own_laws(law, x) for law in laws)


def _has_own_laws(law: EnergyDistribution, x: Tensor) -> bool:
    """Whether rows have natural parameters, statistics, energies or a base of their own."""
    energy = law.energy_function
    if isinstance(energy, ExponentialFamily):
        natural = energy.natural()
        rows = natural.reshape(-1, natural.shape[-1])
        if bool((rows != rows[:1]).any()):
            return True
    return law.conditional is None and depends_on_rows(law, x)


def _law_of(site: Any) -> EnergyDistribution:
    law = unwrap(site["fn"])
    assert law is not None
    return law
