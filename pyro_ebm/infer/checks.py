"""What a model and its data must satisfy before an objective may learn from them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.util import check_site_shape
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, unwrap
from pyro_ebm.distributions.captured import capture_in_progress, captured_only
from pyro_ebm.distributions.layers import innermost
from pyro_ebm.distributions.normalizer_guard import names_of
from pyro_ebm.errors import NonFiniteEnergyError, SurrogateWarning, UnregisteredParameterError
from pyro_ebm.infer import enumeration, site_values
from pyro_ebm.infer.evaluation import Evaluation
from pyro_ebm.infer.separation import Separation
from pyro_ebm.ops.autograd import grad_of
from pyro_ebm.ops.autograd_graph import children, graph, leaves_of, node_of

MOST_OUTSIDE = 0.1  # share of data beyond all noise that still counts as covered
FEWEST_TO_COVER = 100  # draws that show how far the noise reaches
SETTLED = 128  # in the first steps every comparison may be degenerate
FEWEST_BASE_DRAWS = 32


class Traits(Protocol):
    """What is asked of an objective here."""

    needs_density: bool
    trains_energy: bool
    has_second_player: bool

    separations: dict[str, Separation]

    @property
    def learns_log_normalizer(self) -> bool:
        """Whether log Z enters the loss, so that it is learned."""

    @property
    def learns_by_gradient(self) -> bool:
        """Whether log Z is a parameter for the optimizer."""


def schedule(value: tuple[int, int] | None, objective: Traits) -> tuple[int, int] | None:
    """Returns a valid schedule of two players.

    Raises:
        ValueError: If it is not two non-negative integers with a positive sum, or there is no
            second player.
    """
    if value is None:
        return None
    if not objective.has_second_player:
        raise ValueError(
            f"{type(objective).__name__} has no second player, so it takes no schedule"
        )
    if len(value) != 2 or min(value) < 0 or sum(value) == 0:
        raise ValueError(
            f"schedule must be (energy steps, generator steps), two counts, got {value!r}"
        )
    return (int(value[0]), int(value[1]))


def rate(name: str, value: float) -> float:
    """Returns a weight of the newest batch.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], the weight of the newest batch, got {value!r}")
    return value


def has_sites(used: Collection[str]) -> None:
    """Raises ``ValueError`` if the model has no EBM site."""
    if not used:
        raise ValueError(
            "the model has no EnergyDistribution site for the objective to learn from; "
            "for a model without one use pyro.infer.Trace_ELBO"
        )


def site(name: str, p: EnergyDistribution, x: Tensor, *, observed: bool, objective: Traits) -> None:
    """Raises if the objective cannot serve this site (checked once per site).

    Raises:
        ValueError: If the distribution, its support or the data's dtype do not suit it.
        EnergyShapeError: If the energy has a dim too many.
    """
    who = type(objective).__name__
    if isinstance(p, GeneralizedEBM) and not observed:
        raise ValueError(
            f"GeneralizedEBM site {name!r} is latent: sample it through poutine.reparam(model, "
            f"{{{name!r}: LatentReparam()}})"
        )
    if isinstance(p, GeneralizedEBM) and objective.needs_density:
        raise ValueError(
            f"{who} needs a density, and GeneralizedEBM site {name!r} has none: use KALE or "
            "DonskerVaradhan"
        )
    if objective.trains_energy and p.base_measure == "lebesgue" and not x.is_floating_point():
        raise ValueError(
            f"{who} takes the data of EBM site {name!r} as points of {p.support}, so x must be "
            f"floating point, got {x.dtype}: call x.double() if the data are measurements, or give "
            "the distribution a discrete support and use NCE or PseudoLikelihood"
        )
    _log_normalizer_is_learned(name, p, x, objective)
    if objective.trains_energy:
        site_values.one_energy_per_row(name, p, x)
    if objective.trains_energy and x.is_floating_point() and p.base_measure != "counting":
        try:
            _, slope = grad_of(p.energy, x)
        except ValueError as error:
            raise ValueError(f"EBM site {name!r}: {error}") from error
        if not slope.any() and not leaves_of(p.energy(x)):
            warnings.warn(
                f"EBM site {name!r}: the energy is constant at the data and has no parameters, so "
                "that nothing is learned of it. Does it use x?",
                SurrogateWarning,
                stacklevel=2,
            )


def _log_normalizer_is_learned(
    name: str, p: EnergyDistribution, x: Tensor, objective: Traits
) -> None:
    """Warns if the site's log Z has parameters of its own and the objective never moves them."""
    log_z = None if objective.learns_log_normalizer else p.log_normalizer_value()
    if log_z is None or not log_z.requires_grad:
        return
    moved = {id(t) for t in leaves_of(p.unnormalized_log_prob(x))}
    if any(id(t) not in moved for t in leaves_of(log_z)):
        warnings.warn(
            f"EBM site {name!r}: log_normalizer= has parameters of its own, but log Z cancels in "
            f"{type(objective).__name__}, so that they are not learned and log_prob stays off by "
            "as much. Learn it with NCE or KALE, or leave log_normalizer= out",
            SurrogateWarning,
            stacklevel=2,
        )


class _Draws(NamedTuple):
    """What an objective calls the draws that it weights, and how to have more or better ones."""

    name: str
    more: str
    better: str


_BASE = _Draws(
    "base draws",
    "Give num_base=256 or a larger batch",
    "Raise gradient_penalty, lower the learning rate, or improve the base",
)
_NOISE = _Draws(
    "noise draws",
    "Raise num_noise or the batch size",
    "Choose noise with tails no lighter than the model's, or lower the learning rate",
)


def not_degenerate(name: str, evaluation: Evaluation, objective: Traits, step: int) -> None:
    """Warns if a comparison has nothing left to compare: its gradients then mean little."""
    notes, who = evaluation.notes, type(objective).__name__
    draws = _NOISE if hasattr(objective, "num_noise") else _BASE
    _noise_covers_data(name, evaluation, who)
    _draws_suffice(name, evaluation, objective, draws, is_settled=step >= SETTLED)
    if step < SETTLED:
        return
    if float(notes.get("weight_ess", 1.0)) < 0.01:
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: the effective sample size of the "
            f"{draws.name} is {float(notes['weight_ess']):.1%} of their number, so that gradients "
            f"come from a handful of them. {draws.better}",
            SurrogateWarning,
            stacklevel=2,
        )
    if objective.separations[name].is_complete():
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: data and contrast are told apart without "
            "error, so that there is nothing to learn from. Choose noise closer to the data (a "
            "fitted Gaussian or a flow), or a smaller perturbation",
            SurrogateWarning,
            stacklevel=2,
        )
    elif float(notes.get("noise_ess", 1.0)) < 0.01:
        warnings.warn(
            f"{who} at EBM site {name!r}, step {step}: the noise does not cover the model, its "
            f"draws are worth {float(notes['noise_ess']):.1%} of their number, and log Z rests on "
            "a handful of them. Choose noise with the data's place and spread and tails no lighter "
            "(a fitted Gaussian or a flow), or an objective without noise",
            SurrogateWarning,
            stacklevel=2,
        )


def _draws_suffice(
    name: str, evaluation: Evaluation, objective: Traits, draws: _Draws, *, is_settled: bool
) -> None:
    """Warns if the log of a mean of few weights stands for log Z; of one weight, at once."""
    num = evaluation.num_weights
    is_parameter = objective.learns_log_normalizer and objective.learns_by_gradient
    few = num < (FEWEST_BASE_DRAWS if is_settled else 2)
    if "weight_ess" in evaluation.notes and few and not is_parameter:
        count = f"1 {draws.name[:-1]} a step is" if num == 1 else f"{num} {draws.name} a step are"
        warnings.warn(
            f"{type(objective).__name__} at EBM site {name!r}: {count} few for the log of their "
            "mean weight, which is biased by about their relative variance over twice their "
            f"number. {draws.more}",
            SurrogateWarning,
            stacklevel=3,
        )


def _noise_covers_data(name: str, evaluation: Evaluation, who: str) -> None:
    """Warns if many data lie where no noise does.

    Where noise is distributed as the data, a datum is less likely under it than all N of its draws
    with probability 1 / (N + 1).
    """
    if evaluation.noise is None or get_proxy_mode() is not None:
        return
    on_data, on_draws = evaluation.noise()
    if on_draws.numel() < FEWEST_TO_COVER:
        return
    data = evaluation.rows(on_data, on_data.dim())
    outside = float((data < on_draws.amin()).double().mean())
    if outside > MOST_OUTSIDE:
        warnings.warn(
            f"{who} at EBM site {name!r}: the noise does not cover the data: {outside:.0%} of them "
            "are less likely under it than all of its draws, so that the energy may come out in "
            "any shape there. Choose noise with the data's place and spread and tails no lighter "
            "(noise='gaussian', a flow), or an objective without noise",
            SurrogateWarning,
            stacklevel=2,
        )


def full_data(name: str, site: Any) -> None:
    """Raises ``ValueError`` if a site that is to be frozen sees a subsample.

    The next subsample would be other rows.
    """
    for frame in site["cond_indep_stack"]:
        full = getattr(frame, "full_size", None)
        if full is not None and full != frame.size:
            raise ValueError(
                f"EBM site {name!r} is in the subsampling plate {frame.name!r} ({frame.size} of "
                f"{full} rows): a frozen objective needs the full data, take subsample_size away"
            )


def guide(given: Any, who: str) -> None:
    """Raises ``TypeError`` for a guide that runs the model itself.

    Its sites would be taken for contrasts.
    """
    if isinstance(poutine.unwrap(given), Messenger):
        raise TypeError(
            f"{type(given).__name__} is an effect-style guide, which runs the model by itself: "
            f"build it on poutine.surrogate(model, {who}()) and use it with pyro.infer.Trace_ELBO"
        )


def traces(model_trace: Any, guide_trace: Any, used: Collection[str]) -> None:
    """Raises if the traces of an objective's step hold something it would get wrong."""
    has_sites(used)
    enumeration.check_traces(model_trace, guide_trace, used)
    site_values.given(model_trace, guide_trace, used)
    for name in used:
        if model_trace.nodes[name]["is_observed"]:
            site_values.on_support(name, model_trace.nodes[name])
    for name, node in guide_trace.nodes.items():
        ebm = unwrap(node["fn"]) if node["type"] == "sample" else None
        contrast = model_trace.nodes.get(name, {}).get("is_observed", False)
        if ebm is not None and not contrast and not ebm.is_normalized:
            raise ValueError(
                f"guide site {name!r} is an EnergyDistribution with unknown log Z: a variational "
                "factor must be normalized. Use a normal or a flow, or sample the latent by MCMC"
            )


def shapes(model_trace: Any, guide_trace: Any, max_plate_nesting: float) -> None:
    """Raises ``ValueError`` for batch dims that no plate declares, as Pyro's own ELBOs do."""
    if not is_validation_enabled():
        return
    for trace in (model_trace, guide_trace):
        for node in trace.nodes.values():
            if node["type"] == "sample":
                check_site_shape(node, max_plate_nesting)


def free_of_latents(name: str, model_trace: Any, guide_trace: Any, objective: Traits) -> None:
    """Raises ``ValueError`` if an objective knows one law of a site that moves with a latent.

    It learns one number for log Z, or keeps the chains of one law. Latents with a point estimate
    (``Delta``) are parameters: log Z is learned along with them.
    """
    if not torch.is_grad_enabled():  # nothing is inferred, and there is no graph
        return
    drawn = {n for n, s in guide_trace.nodes.items() if s["type"] == "sample"}
    if all(n == name or is_point(guide_trace.nodes[n]["fn"]) for n in drawn):
        return
    node = model_trace.nodes[name]
    reached = graph(children(node["log_prob"]), stop=node_of(node["value"]))

    def behind(trace: Any) -> list[str]:
        sites = [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and n != name]
        return [n for n, s in sites if any(v in reached for v in node_of(s["value"]))]

    random = [n for n in behind(guide_trace) if not is_point(guide_trace.nodes[n]["fn"])]
    if random:
        latents = ", ".join(repr(n) for n in behind(model_trace) or random)
        raise ValueError(
            f"the energy of EBM site {name!r} depends on latent {latents}, "
            f"{_bent_by_latents(objective)}"
        )


def _bent_by_latents(objective: Traits) -> str:
    who = type(objective).__name__
    if not objective.learns_log_normalizer:
        return (
            f"but {who} keeps the chains of one law, which would bend the posterior. Use "
            "ContrastiveDivergence, RankingNCE or EnergyDiscrepancy"
        )
    return (
        f"so log Z does, but {who} learns one number for it, which would bend the posterior. Use "
        "RankingNCE or EnergyDiscrepancy, give log_normalizer= as a function of the latent, or "
        "freeze the objective and run MCMC over poutine.surrogate(model, frozen)"
    )


def is_point(fn: Any) -> bool:
    """Whether a law has all its mass at one point, as an estimate without spread has."""
    return isinstance(innermost(fn), Delta)


def finite(model_trace: Any, used: Collection[str], step: int) -> None:
    """Raises ``NonFiniteEnergyError`` naming an EBM site whose surrogate is not finite.

    Masked rows do not count.
    """
    for name in used:
        log_prob = model_trace.nodes[name]["log_prob"]
        bad = ~torch.isfinite(log_prob.detach())
        if bad.any():
            raise NonFiniteEnergyError(
                f"EBM site {name!r}: the surrogate is not finite in {int(bad.sum())} of "
                f"{bad.numel()} rows at step {step}. Look for overflow in the energy at data or "
                "contrast, standardize the data, or lower the learning rate"
            )


def registered(
    model_trace: Any,
    used: Collection[str],
    sites: Mapping[str, EnergyDistribution],
    expected: Collection[int],
) -> None:
    """Raises if a parameter gets gradient through a surrogate and no optimizer will move it.

    Only decidable while parameters are being captured, as in ``SVI.step`` and ``fit``.
    """
    if capture_in_progress() is None:
        return
    for name in used:
        leaves = leaves_of(model_trace.nodes[name]["log_prob"])
        moved = {id(t) for t in captured_only(leaves)} | set(expected)
        lost = [t for t in leaves if id(t) not in moved]
        if lost:
            energy = sites[name].energy_function
            raise UnregisteredParameterError(
                f"EBM site {name!r}: {names_of(lost, energy)} would get gradients and never move, "
                "because Pyro does not know of it. Call pyro.module('energy', energy) in the "
                "model (and so for a network of log_normalizer=), make it a PyroModule, or freeze "
                "it with requires_grad_(False)"
            )
