r"""The evidence :math:`\log p(y) = \log \int p(y \mid \theta)\, p(\theta)\, d\theta` of a model.

It is the log Z of the posterior with respect to its unconstrained coordinates, and is estimated as
that: by bridge sampling from draws of the posterior, or along the ladder :math:`p(\theta)\, p(y
\mid \theta)^\beta` from the prior by stepping stones or thermodynamic integration. It compares
models also where there is one dependent observation, which leaves nothing to leave out.

What cancels in a posterior counts here: the log Z of every EBM site, constant or not, must be
known, and priors must be proper. A log Z that is known up to a constant (``Anchored`` of a family
that does not know its own) shifts the evidence by that constant, for each observation: the ratio of
two models that share it is right, the evidence of one is not. A log Z made of draws is NaN where
those tell nothing, which a bridge leaves out, and a path from the prior cannot.

References:
    Meng, Wong, Simulating ratios of normalizing constants via a simple identity, Statistica Sinica
    6, 1996; Gronau et al., A tutorial on bridge sampling, Journal of Mathematical Psychology 81,
    2017; Kass, Raftery, Bayes factors, JASA 90, 1995.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.chains.constant_estimates import (
    ConstantEstimate,
    constant_estimates,
    left_over,
    total_error,
    varying_error,
    varying_error_at,
)
from pyro_ebm.chains.observations import Conditioned
from pyro_ebm.chains.record import Record, as_record
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.layers import PERIODIC, innermost, is_normalized, is_periodic, mask_of
from pyro_ebm.distributions.normalizer_guard import report
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.targets.model_target import ModelTarget, target_of_model
from pyro_ebm.normalizers.bridge import bridge
from pyro_ebm.normalizers.chain_remarks import chain_remarks
from pyro_ebm.normalizers.tempered import TemperedRun, tempered
from pyro_ebm.normalizers.thermodynamic import stepping_stones, thermodynamic
from pyro_ebm.ops.arguments import one_of
from pyro_ebm.ops.held_draws import HeldDraws, accounted, asked, replicated
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.nan_energies import NaNCount
from pyro_ebm.poutine.aside import aside
from pyro_ebm.poutine.whole_data import check_site_unscaled, check_whole

Model = Callable[..., Any]

_METHODS = ("bridge", "stepping_stones", "thermodynamic")
_PATHS = {"stepping_stones": stepping_stones, "thermodynamic": thermodynamic}
_NUM_CHAINS, _NUM_DRAWS = 64, 250
_NUM_RUNGS, _NUM_PER_RUNG = 12, 60
_NUM_REPLICATES, _NUM_REWEIGHTED = 50, 100  # of the functions for log Z, draws of the posterior
_RELATIVE = (
    "log Z of an EBM site is known up to a constant only, which is part of the evidence: compare "
    "models that share this very function, or give Anchored its log_normalizer"
)
_NO_PATH = (
    "a path from the prior needs log Z all over the prior, and draws that are held tell it near "
    'their anchors, or base, only: use method="bridge", more anchors, or an exact log Z'
)
_OFF_PATH = (
    "a log density of the model is NaN or infinite at a draw between prior and posterior: where a "
    "log Z is a sum, give it more terms, as by num_terms= of ConwayMaxwellPoisson, or use "
    'method="bridge", which stays near the posterior'
)
_NOT_TOLD = (
    "log Z of an EBM site is not told at some of these draws: hold more draws for it, or put "
    "anchors there"
)


@accounted()
def evidence(
    model: Model,
    *args: Any,
    posterior: Any = None,
    method: str = "bridge",
    kwargs: Mapping[str, Any] | None = None,
) -> Evidence:
    """Estimates the log marginal likelihood of a model's data.

    Args:
        model: A Pyro model with continuous latents; discrete ones are enumerated, where they can
            be.
        *args: Its positional arguments.
        posterior: Draws of the posterior, as :func:`~pyro_ebm.chains.to_arviz` takes them; 64
            chains of HMC if not given. For the bridge, and where log Z is made of held draws.
        method: ``"bridge"``, or from the prior ``"stepping_stones"`` or ``"thermodynamic"``.
        kwargs: Keyword arguments of the model.

    Returns:
        A ``LogNormalizer``, the evidence in nats. Where log Z of an EBM site is a function made of
        draws (``Anchored``, ``BaseImportance``) its standard error holds theirs, by resampling;
        where it is a constant that was estimated, that one's for every element that counts, and
        where the model makes it by nodes (``gauss_hermite``, ``quadrature``), what these may be off
        for every element. Draws of chains that did not mix are a doubt.

    Raises:
        MissingNormalizerError: If log Z of an EBM site is not known at every draw, or there is an
            energy factor, which has none.
        NonFiniteEnergyError: If a log Z made of draws is NaN at a draw of the posterior, or where a
            path from the prior leads.
        ValueError: If a prior is improper or periodic on the reals (VonMises), a plate is
            subsampled, a site is scaled, or latents have no draws.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> def model(y):
        ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(m, 1.0), obs=y)
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(1.0))
        >>> bool((evidence(model, torch.tensor(1.0)).value - exact).abs() < 0.02)
        True
    """
    one_of("method", method, _METHODS)
    kwargs = dict(kwargs or {})
    with asked() as functions:
        names, sites, constants, off = _looked_at(model, args, kwargs)
        target = target_of_model(model, args, kwargs)
    if bool((target.flat_terms(torch.ones(1, target.dim)) != 0).any()):
        raise ValueError(f"{target!r}: a latent has no density at all, so there is no evidence")
    positions = torch.empty(0)
    remarks: tuple[str, ...] = ()
    if method == "bridge" or functions:
        record = as_record(_drawn(model, args, kwargs) if posterior is None else posterior)
        positions = _positions(target, names, record)
        record = replace(record, draws={n: x for n, x in record.draws.items() if n in names})
        remarks = chain_remarks(record, walled=bool(functions))
    if method == "bridge":
        found = _bridged(target, positions, held=bool(functions))
        at_draws = Conditioned(model, args, kwargs, record.draws).to(target.dtype)
        off = varying_error_at(at_draws, sites)
    else:
        prior = _Prior(model, args, kwargs, like=target)
        found = _along(target, prior, method, held=bool(functions))
    if functions:
        found = _with_error_of_log_z(found, target, positions, functions)
    own = _with_rounding(found, target.dtype)
    own = None if own is None else _hypot(own, off)
    found = replace(
        found,
        stderr=None if own is None else _hypot(own, total_error(constants)),
        method=f"evidence by {found.method}",
        start="posterior" if method == "bridge" else "prior",
        remarks=(*found.remarks, *remarks),
        parameters=(),
    )
    relative_to = frozenset(f for f in functions if f.is_relative)
    return Evidence(
        **_fields_of(found), relative_to=relative_to, constants=constants, own_stderr=own
    )


@dataclass(frozen=True, eq=False)
class Evidence(LogNormalizer):
    """A log evidence in nats.

    Args:
        relative_to: Functions for log Z that are known up to a constant only, which is part of it.
        constants: Estimates of log Z that are part of it, with how often each counts.
        own_stderr: The standard error in nats without that of the constants, if there are any.
    """

    relative_to: frozenset[HeldDraws] = frozenset()
    constants: tuple[ConstantEstimate, ...] = ()
    own_stderr: Tensor | None = None

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons not to trust value and error bar, a sentence each; empty if there is none."""
        of_constants = (doubt for one in self.constants for doubt in one.doubts)
        return (*super().doubts, *of_constants, *([_RELATIVE] if self.relative_to else []))


def _hypot(error: Tensor, more: float) -> Tensor:
    return torch.hypot(error, torch.full_like(error, more))


def _with_rounding(found: LogNormalizer, dtype: torch.dtype) -> Tensor | None:
    """The standard error with that of a sum over all data, which is rounded as a whole."""
    if found.stderr is None:
        return None
    rounding = torch.finfo(dtype).eps * found.value.abs() / math.sqrt(12.0)
    return torch.hypot(found.stderr, rounding.to(found.stderr))


def _fields_of(found: LogNormalizer) -> dict[str, Any]:
    return {f.name: getattr(found, f.name) for f in fields(found) if f.init}


class BayesFactor(NamedTuple):
    """The log of how much likelier the data are under one model than under another.

    Args:
        value: In nats, positive for the first.
        stderr: Its standard error.
        doubts: Reasons not to trust it.
    """

    value: Tensor
    stderr: Tensor
    doubts: tuple[str, ...]

    def __str__(self) -> str:
        text = f"log Bayes factor = {float(self.value):.3f} ± {float(self.stderr):.3f} nats"
        return f"{text}; not to be trusted: {'; '.join(self.doubts)}" if self.doubts else text


def bayes_factor(one: LogNormalizer, other: LogNormalizer) -> BayesFactor:
    """Returns the log Bayes factor of two evidences of the same data.

    Constants of the log Z that both share cancel, and so does the error of an estimate of log Z, as
    often as both count it; errors of held draws that they share do not, which makes the stated one
    large.

    Raises:
        ValueError: If one of them has no standard error.

    Example:
        >>> one, other = (LogNormalizer(torch.tensor(v), torch.tensor(0.03)) for v in (-8.0, -9.5))
        >>> print(bayes_factor(one, other))
        log Bayes factor = 1.500 ± 0.042 nats
    """
    if one.stderr is None or other.stderr is None:
        raise ValueError("a Bayes factor needs two evidences with standard errors")
    constants = left_over(_constants(one), _constants(other))
    error = _hypot(torch.hypot(_own(one), _own(other)), total_error(constants))
    return BayesFactor(one.value - other.value, error, _doubts_of_ratio(one, other, constants))


def _constants(found: LogNormalizer) -> tuple[ConstantEstimate, ...]:
    return found.constants if isinstance(found, Evidence) else ()


def _own(found: LogNormalizer) -> Tensor:
    own = found.own_stderr if isinstance(found, Evidence) else None
    return torch.as_tensor(found.stderr if own is None else own)


def _doubts_of_ratio(
    one: LogNormalizer, other: LogNormalizer, constants: tuple[ConstantEstimate, ...]
) -> tuple[str, ...]:
    """What speaks against either, told once; constants that cancel do not."""
    left = {part.estimate for part in constants}
    parts = (part for z in (one, other) for part in _constants(z) if part.estimate not in left)
    cancelled = {doubt for part in parts for doubt in part.doubts}
    if getattr(one, "relative_to", None) == getattr(other, "relative_to", None):
        cancelled.add(_RELATIVE)
    first, second = ([d for d in z.doubts if d not in cancelled] for z in (one, other))
    which = dict.fromkeys(first, "first") | dict.fromkeys(second, "second")
    which |= dict.fromkeys((d for d in first if d in second), "both")
    return tuple(f"{who}: {doubt}" for doubt, who in which.items())


# --- what is refused


def _looked_at(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[set[str], set[str], tuple[ConstantEstimate, ...], float]:
    """Names of latents and of all sites, estimates of log Z, and what others are off by prior."""

    def run() -> poutine.Trace:
        return poutine.trace(_OnlyProper()(model)).get_trace(*args, **kwargs)

    with torch.no_grad(), aside():
        sites = _checked_sites(run())
        other = _checked_sites(run())
        constants = constant_estimates(sites, lambda: other)
    names = {name for name, site in sites.items() if not site["is_observed"]}
    return names, set(sites), constants, varying_error([sites, other])


def _checked_sites(trace: poutine.Trace) -> dict[str, Any]:
    check_whole(trace)
    nodes = trace.nodes.items()
    sites = {n: s for n, s in nodes if s["type"] == "sample" and not site_is_subsample(s)}
    for name, site in sites.items():
        if mask_of(site["fn"], site["mask"]) is not False:
            check_site_unscaled(site, "the evidence is that of the data as they are")
            _check_density(name, site)
    return sites


class _OnlyProper(Messenger):
    """Refuses improper priors, before they are drawn from in vain."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        is_improper = isinstance(innermost(msg["fn"]), ImproperUniform)
        if is_improper:
            raise ValueError(
                f"site {msg['name']!r} has an improper prior, under which no data have evidence"
            )
        if is_periodic(msg["fn"]) and not msg["is_observed"]:
            raise ValueError(
                f"site {msg['name']!r} has a periodic prior, {PERIODIC}: draw x on one period, "
                "from Uniform(a, a + 2 * math.pi) with a where the posterior is low, and weigh it "
                'by pyro.factor("prior", prior.log_prob(x) + math.log(2 * math.pi))'
            )


def _check_density(name: str, site: Any) -> None:
    if (site["infer"] or {}).get("energy_factor"):
        report(
            f"energy_factor {name!r} has no log Z, and the evidence would be off by it: write it "
            "as a sample site of an EnergyDistribution with log_normalizer="
        )
    if not is_normalized(site["fn"]):
        report(
            f"EBM site {name!r}: log Z is unknown, and the evidence would be off by it even if it "
            "is constant: give log_normalizer="
        )


# --- from the posterior


def _drawn(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MCMC:
    mcmc = MCMC(HMC(model), _NUM_DRAWS, num_chains=_NUM_CHAINS, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


def _positions(target: ModelTarget, names: set[str], posterior: Record) -> Tensor:
    draws = posterior.draws
    latents = target.split(torch.zeros(1, target.dim)).keys() & names
    if missing := sorted(latents - draws.keys()):
        raise ValueError(f"the posterior has no draws of {', '.join(missing)}, got {sorted(draws)}")
    values = {n: torch.as_tensor(draws[n], dtype=target.dtype) for n in latents}
    return target.position_of({n: x.to(target.device) for n, x in values.items()})


def _proper(energy: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The energy of a posterior, which may be rounded to a constant far out where Z is finite."""
    energy.is_proper = True  # type: ignore[attr-defined]
    return energy


def _flat(target: ModelTarget) -> Callable[[Tensor], Tensor]:
    """The potential at positions with any lead.

    An energy runs no sample statements of its own, and this one runs those of a model, which are
    none of it: values are given, or enumerated.
    """

    def potential(q: Tensor) -> Tensor:
        rows = q.reshape(-1, target.dim).to(target.dtype)
        with poutine.block(), pyro.validation_enabled(is_validate=False):  # checks branch
            return target.potential(rows).reshape(q.shape[:-1])

    return potential


def _bridged(target: ModelTarget, positions: Tensor, *, held: bool) -> LogNormalizer:
    """The bridge; where log Z is made of held draws, a NaN is theirs and none of the user's."""
    potential, seen = _flat(target), NaNCount()
    energy = (lambda q: seen(potential(q))) if held else potential
    try:
        found = bridge(EnergyDistribution(_proper(energy), event_shape=(target.dim,)), positions)
    except NonFiniteEnergyError as error:
        if not seen.number:
            raise
        raise NonFiniteEnergyError(_NOT_TOLD) from error
    if not seen.number:
        return found
    remark = (
        f"log Z of an EBM site is not told at {seen.number} positions near the posterior, and "
        "what lies there is left out: use more held draws, or anchors there"
    )
    return replace(found, remarks=(*found.remarks, remark))


# --- log Z's that are estimates


def _with_error_of_log_z(
    found: LogNormalizer, target: ModelTarget, positions: Tensor, functions: list[HeldDraws]
) -> LogNormalizer:
    """Adds what the evidence would change by, were the draws behind log Z others."""
    remarks = []
    rows = positions.reshape(-1, target.dim)
    kept = torch.linspace(0, len(rows) - 1, min(len(rows), _NUM_REWEIGHTED)).long()
    rows, potential = rows[kept.to(rows.device)], _flat(target)
    try:
        changes = potential(rows) - replicated(lambda: potential(rows), functions, _NUM_REPLICATES)
    except ValueError as why:
        remarks.append(f"the error of the log Z of EBM sites is unknown: {why}")
        return replace(found, remarks=(*found.remarks, *remarks))
    spread = (torch.logsumexp(changes, 1) - math.log(len(rows))).std()
    if not bool(spread.isfinite()):
        remarks.append(
            "the error of the log Z of EBM sites is unknown: resampled draws do not reach all of "
            "the posterior: use more of them, or anchors nearer to it"
        )
        return replace(found, remarks=(*found.remarks, *remarks))
    own = 0.0 if found.stderr is None else found.stderr
    error = torch.hypot(spread, torch.as_tensor(own, dtype=spread.dtype, device=spread.device))
    return replace(found, stderr=error, remarks=(*found.remarks, *remarks))


# --- from the prior


def _between(target: ModelTarget, prior: _Prior) -> EnergyDistribution:
    """The posterior as a tilt of the prior by the log likelihood."""
    joint, before = _flat(target), _flat(prior.target)
    return EnergyDistribution(_proper(lambda q: joint(q) - before(q)), base=prior)


def _along(target: ModelTarget, prior: _Prior, method: str, *, held: bool) -> LogNormalizer:
    """A path from the prior, which must not lead where held draws do not tell log Z."""
    law = _between(target, prior)
    if held and bool(law.energy(prior.sample((_NUM_CHAINS,))).isnan().any()):
        raise NonFiniteEnergyError(_NO_PATH)
    try:
        return _PATHS[method](law, _tempered(law))
    except NonFiniteEnergyError as error:
        raise NonFiniteEnergyError(_NO_PATH if held else f"{error}; {_OFF_PATH}") from error


def _tempered(law: EnergyDistribution) -> TemperedRun:
    """A run that is short enough for draws of the prior that are made one by one."""
    return tempered(
        law,
        num_rungs=_NUM_RUNGS,
        num_chains=_NUM_CHAINS,
        num_samples=_NUM_PER_RUNG,
        warmup_steps=_NUM_PER_RUNG,
    )


class _WithoutData(Messenger):
    """Takes what is observed, factors included, out of a model's density."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"]:
            msg["mask"] = False


class _Prior(TorchDistribution):
    """The prior of a model's latents in the unconstrained coordinates of its posterior."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(
        self, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], *, like: ModelTarget
    ) -> None:
        super().__init__(event_shape=torch.Size((like.dim,)), validate_args=False)
        self.model, self.args, self.kwargs = model, args, kwargs
        self.like = like
        self.target = target_of_model(_WithoutData()(model), args, kwargs)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of positions ``lead + (D,)``."""
        return -_flat(self.target)(value)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws positions, ``sample_shape + (D,)``, by running the model."""
        shape = torch.Size(sample_shape)
        with poutine.block(), pyro.validation_enabled(is_validate=False):
            rows = self._batched(shape.numel())
            if rows is None:
                rows = torch.stack([self._one() for _ in range(shape.numel())])
        return rows.reshape(shape + self.event_shape)

    def _batched(self, num: int) -> Tensor | None:
        """All at once, where ``vmap`` can follow the model's draws."""
        if not self.like.is_vectorized:
            return None
        with suppress(RuntimeError), warnings.catch_warnings():  # not all can be drawn under vmap
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.vmap(lambda _: self._one(), randomness="different")(torch.zeros(num))
        return None

    def _one(self) -> Tensor:
        nodes = poutine.trace(self.model).get_trace(*self.args, **self.kwargs).nodes
        names = self.like.split(torch.zeros(1, self.like.dim))
        return self.like.position_of({name: nodes[name]["value"] for name in names})
