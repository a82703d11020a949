r"""Looking over a model before inference: does every log Z cover what its energy depends on?

For :math:`p(x\mid\theta) = e^{-U(x,\theta)} / Z(\theta)` the guard in ``log_prob`` raises when a
gradient with respect to :math:`\theta` meets a log Z that does not account for it. Some inferences
send no gradient: enumerated and other discrete parents, score functions, weights of particles,
forward mode. This check needs none. It runs the model on tensors that remember which sample sites
they were computed from (Pyro's provenance), and names the parents.

It cannot see a value that leaves torch on its way (``float(theta)``, ``if theta > 0``). A
dependence on *observed* values is harmless: log Z is then constant. Trained parameters are only
listed, since learning them is legitimate under an objective made for unnormalized models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, unwrap
from pyro_ebm.distributions.call_stack import prototype_run
from pyro_ebm.distributions.known_normalizer import problem_with
from pyro_ebm.distributions.layers import mask_of
from pyro_ebm.distributions.normalizer_guard import (
    factor_problem,
    names_of,
    remedies,
    report,
)
from pyro_ebm.distributions.supports import tensors_in
from pyro_ebm.errors import MissingNormalizerError
from pyro_ebm.ops.autograd import grad_of
from pyro_ebm.ops.autograd_graph import leaves_of
from pyro_ebm.poutine.aside import aside
from pyro_ebm.poutine.gradient_check import GradientCheck, check_gradients
from pyro_ebm.poutine.paired_runs import Pair, paired_runs, without_value_checks
from pyro_ebm.poutine.site_check import ModelCheck, SiteCheck, listed


def check_model(
    model: Callable[..., Any],
    *args: Any,
    at: Mapping[str, Tensor] | None = None,
    num_samples: int = 2048,
    exact_energies: bool = False,
    **kwargs: Any,
) -> ModelCheck:
    """Checks that every EBM site's log Z covers the latents that its energy and base depend on.

    The model is run three times; random state and parameter store are left as they were. Where
    log Z is a function or a tensor with a graph, its slope is compared with draws of the
    distribution (five standard errors plus two percent are allowed).

    Args:
        model: A Pyro model, with or without ``poutine.reparam`` and other handlers around it.
        *args: Its arguments.
        at: Values of latents at which to check; by default a draw from the prior.
        num_samples: Draws for the comparison of slopes; 0 leaves it out.
        exact_energies: Whether to compare the slopes also of energies that know their own log Z.
        **kwargs: The model's keyword arguments; for one called like an option above pass a
            ``functools.partial``.

    Returns:
        A :class:`ModelCheck` with one entry per EBM site and energy factor.

    Raises:
        MissingNormalizerError: If a latent would be inferred through an unknown, constant, stale or
            wrong log Z (a warning or nothing, as the setting ``ebm_missing_normalizer`` says).
        NonFiniteEnergyError: If an energy is not finite at its own site's value, or log Z is not.
        ValueError: If ``at`` names a site that is not a latent of the model.

    Example:
        >>> def model(x):
        ...     theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        ...     p = EnergyDistribution(
        ...         lambda x: theta * x**2 / 2,
        ...         event_shape=(),
        ...         log_normalizer=lambda: 0.5 * (2 * torch.pi / theta).log(),
        ...     )
        ...     with pyro.plate("n", len(x)):
        ...         pyro.sample("x", p, obs=x)
        >>> check_model(model, torch.randn(20)).is_sound
        True
    """
    with aside():
        sites = {}
        for pair in paired_runs(model, args, kwargs, dict(at or {})):
            if pair.is_factor:
                sites[pair.name] = _check_factor(pair)
            elif mask_of(pair.site["fn"], pair.site["mask"]) is False:
                sites[pair.name] = SiteCheck("EBM site", "not used", notes=("masked out",))
            else:
                sites[pair.name] = _check_ebm(pair, num_samples, exact=exact_energies)
    problems = [site.problem for site in sites.values() if site.problem is not None]
    if problems:
        report("\n".join(problems))
    return ModelCheck(sites)


def has_energies(trace: Any) -> bool:
    """Whether a model has a site whose log Z may matter in ways that gradients do not show."""
    sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
    return any(unwrap(s["fn"]) is not None or s["infer"].get("energy_factor") for s in sites)


def check_structure(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Any,
    *,
    at: Mapping[str, Tensor] | None = None,
) -> None:
    """Runs :func:`check_model` without slopes, for entry points that no gradient protects.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        at: Values of latents at which the density is finite, where some are known.

    Raises:
        MissingNormalizerError: As :func:`check_model`.

    Warns:
        UserWarning: If the model cannot be run on values that remember where they came from.
    """
    try:
        with prototype_run():
            check_model(partial(model, **kwargs), *args, at=at, num_samples=0)
    except MissingNormalizerError:
        raise
    except Exception as error:  # models may do anything with their values
        warnings.warn(
            f"whether every log Z covers the latents of its energy was not checked: {error}",
            stacklevel=2,
        )


# --- judging a site


def _target(site: Any) -> tuple[EnergyDistribution, Tensor]:
    """The distribution whose Z is in question, and a point without a history."""
    p = unwrap(site["fn"])
    if isinstance(p, GeneralizedEBM):
        with torch.no_grad():
            return p.latent, detach_provenance(p.prior.sample())
    return p, detach_provenance(site["value"]).detach()  # type: ignore[return-value]


class _Known(NamedTuple):
    """What a site's log Z is, and what it and the potential depend on."""

    p: EnergyDistribution
    x: Tensor
    gap: str | None
    latents: tuple[str, ...]
    latents_of_bounds: tuple[str, ...]
    latents_of_log_z: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    parameters_of_log_z: tuple[Tensor, ...]

    @property
    def is_function(self) -> bool:
        return self.gap is None and callable(self.p.log_normalizer)

    @property
    def is_exact(self) -> bool:
        own = getattr(self.p.energy_function, "log_normalizer", None)
        return self.p.is_exact_energy and self.p.log_normalizer == own

    @property
    def is_learned(self) -> bool:
        return any(all(t is not u for u in self.parameters) for t in self.parameters_of_log_z)

    @property
    def has_graph(self) -> bool:
        return bool(self.latents_of_log_z or self.parameters_of_log_z)

    @property
    def uncovered(self) -> tuple[str, ...]:
        covered = self.latents if self.is_function else self.latents_of_log_z
        return tuple(n for n in self.latents if n not in covered)

    @property
    def uncovered_parameters(self) -> list[Tensor]:
        if self.is_function and not self.is_learned:
            return []
        return [t for t in self.parameters if all(t is not u for u in self.parameters_of_log_z)]

    def __str__(self) -> str:
        if self.gap is not None:
            return self.gap.removeprefix("log Z is ")
        if self.is_exact:
            return "known by the energy"
        if self.is_function:
            return "given as a function"
        return "given as a tensor with a graph" if self.has_graph else "given as a constant"


def _known(pair: Pair) -> _Known:
    p, x = _target(pair.tracked)
    gap = problem_with(p.log_normalizer)
    with torch.no_grad(), without_value_checks():
        bounds = _latents_in([*tensors_in(p.support)], pair)
        weighing = [p.unnormalized_log_prob(x), pair.tracked["scale"] if gap else None]
        latents = _latents_in([*weighing, *tensors_in(p.support)], pair)
        of_log_z = _latents_in(p.log_normalizer_value(), pair)
    p, x = _target(pair.site)
    with torch.enable_grad():
        parameters = _parameters_in(p.unnormalized_log_prob(x), pair)
        log_z = p.log_normalizer_value()
    own = _parameters_in(log_z, pair)
    of_log_z = tuple(n for n in of_log_z if _is_attached(pair.leaves[n], log_z))
    return _Known(p, x, gap, latents, bounds, of_log_z, parameters, own)


def _is_attached(latent: Tensor, log_z: Tensor | None) -> bool:
    """Whether gradients reach a latent from log Z, if any can: detached values are constants."""
    reached = leaves_of(log_z) if log_z is not None else []
    return not latent.requires_grad or any(t is latent for t in reached)


def _latents_in(value: Any, pair: Pair) -> tuple[str, ...]:
    found = get_provenance(value)
    return tuple(name for name in pair.leaves if name in found)


def _parameters_in(value: Tensor | None, pair: Pair) -> tuple[Tensor, ...]:
    leaves = leaves_of(value) if value is not None else []
    return tuple(t for t in leaves if all(t is not v for v in pair.leaves.values()))


def _check_ebm(pair: Pair, num_samples: int, *, exact: bool) -> SiteCheck:
    known = _known(pair)
    notes = [*_notes_on_energy(pair, known), *_notes_on_log_z(pair, known)]
    checks: tuple[GradientCheck, ...] | None = ()
    leaves = _leaves_to_check(pair, known)
    if num_samples and leaves and (exact or not known.is_exact):
        checks = check_gradients(known.p, leaves, num_samples)
        if checks is None:
            notes.append("the slope of log Z was not compared: sample() gave no trustworthy draws")
    return SiteCheck(
        "EBM site",
        str(known),
        latents=known.latents,
        uncovered=known.uncovered,
        parameters=_named(known.uncovered_parameters, known.p.energy_function),
        gradients=checks or (),
        notes=tuple(notes),
        problem=_problem(f"EBM site {pair.name!r}", known, checks or ()),
    )


def _leaves_to_check(pair: Pair, known: _Known) -> dict[str, Tensor]:
    """The leaves for which log Z claims to hold; none for a constant."""
    if known.gap is not None or not (known.is_function or known.has_graph):
        return {}
    names = known.latents if known.is_function else known.latents_of_log_z
    # The slope in a bound of the support is a density at the bound and no mean of slopes.
    names = tuple(n for n in names if n not in known.latents_of_bounds)
    latents = {n: pair.leaves[n] for n in names if pair.leaves[n].requires_grad}
    parameters = known.parameters if known.is_function else known.parameters_of_log_z
    parameters = () if known.is_learned else parameters
    energy = known.p.energy_function
    return latents | {_named([t], energy)[0]: t for t in parameters}


def _problem(where: str, known: _Known, checks: Sequence[GradientCheck]) -> str | None:
    if known.uncovered:
        why = known.gap or "log Z was given as a constant"
        names = listed(known.uncovered)
        return f"{where}: {why}, but latent {names} would be inferred through it. {remedies(where)}"
    if free := [n for n in known.latents_of_log_z if n not in known.latents]:
        return (
            f"{where}: log_normalizer depends on latent {listed(free)} but the energy does not, so "
            "inference would push it to where log Z is smallest"
        )
    if wrong := [str(check) for check in checks if not check.agrees]:
        return f"{where}: log_normalizer is not the log Z of this energy: {'; '.join(wrong)}"
    return None


def _check_factor(pair: Pair) -> SiteCheck:
    infer, value = pair.site["infer"], pair.site["fn"].log_factor
    latents = _latents_in(pair.tracked["fn"].log_factor, pair)
    inputs = _latents_in(pair.tracked["infer"]["factor_inputs"], pair)
    uncovered = () if infer["joint"] or inputs else latents
    behind = {id(t) for x in infer["factor_inputs"] for t in leaves_of(x)}
    trained = [t for t in _parameters_in(value, pair) if id(t) not in behind]
    problem = factor_problem(pair.name, f"latent {listed(uncovered)}")
    return SiteCheck(
        "energy_factor",
        "of the joint density",
        latents=latents,
        uncovered=uncovered,
        parameters=_named([] if infer["joint"] else trained, None),
        problem=problem if uncovered else None,
    )


# --- notes and words


@torch.no_grad()
def _notes_on_energy(pair: Pair, known: _Known) -> Iterator[str]:
    p, x = known.p, known.x
    if not torch.allclose(p.energy(x), p.energy(x), equal_nan=True):
        yield "the energy is random: two evaluations at one point differ (dropout, PyroSample)"
    try:
        if not _depends_on_x(p, x):
            yield "the energy ignores x"
    except RuntimeError as error:
        yield f"the energy has no gradient in x: {error}"
    if p.base_measure in ("counting", "mixed") and pair.name in pair.leaves:
        yield "the support is discrete: NUTS and HMC cannot sample it"


def _depends_on_x(p: EnergyDistribution, x: Tensor) -> bool:
    if not x.is_floating_point() or p.base_measure in ("counting", "mixed"):
        with without_value_checks():
            return "x" in get_provenance(p.energy(ProvenanceTensor(x, frozenset({"x"}))))
    try:
        grad_of(p.energy, x)
    except ValueError:
        return False
    return True


def _notes_on_log_z(pair: Pair, known: _Known) -> Iterator[str]:
    if known.is_learned:
        yield "log Z has parameters of its own: only an objective such as NCE identifies them"
    constant = [
        n
        for n in known.latents
        if n not in known.latents_of_log_z and not pair.leaves[n].requires_grad
    ]
    if known.is_function and constant and not known.is_exact:
        yield (
            f"log Z does not depend on {listed(constant)}: right only if it moves the energy "
            "without changing its integral"
        )


def _named(tensors: Sequence[Tensor], energy: Any) -> tuple[str, ...]:
    return tuple(names_of([t], energy) for t in tensors)
