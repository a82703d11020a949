r"""A posterior over the parameters of an unnormalized model, by telling data from noise.

For n independent rows, K sets of noise are drawn and held; under each,

.. math:: \tilde\pi(\theta, c) \propto \pi(\theta) \prod_i \sigma(G(x_i)) \prod_j
    \{1 - \sigma(G(y_j))\}, \qquad G = -U_\theta - c - \log q - \log\nu,

is sampled by HMC, all chains in one batch, and the draws are pooled. No log Z is needed: c stands
for it, with a flat prior, so that constants of the energy change nothing else. In the parameters
the curvature equals the inverse of NCE's sampling covariance, noise included, so that no loss needs
to be calibrated; this holds as n grows, and if the model is right.

* *Between noise sets* the posterior moves, by a quarter of its sd with ten noise draws per datum
  and by two thirds with one. Its spread is reported, and is in the pooled draws: they are a little
  too wide (by :math:`2(1 - 1/K)` of that variance), never too narrow.
* *c = log Z*, drawn beside the parameters, comes out with a variance too large by
  :math:`(1 + 1/\nu)/n`, whatever the parameters. It is corrected: of c minus its regression on the
  parameters, the sd is scaled from :math:`1/\sqrt H` (its curvature, H the sum of
  :math:`\sigma(1 - \sigma)`) to Bennett's error, which takes off just that and no covariance with
  the parameters. A draw of (parameters, c) then is a guess at log Z at these parameters.
* *Efficiency* is lost quickly beyond ten dimensions, or where noise is told from data too easily.

One dependent observation, such as a lattice or a network, has no rows to be told from noise, and
conditional models have a log Z for every row: both are refused.

References:
    Gutmann, Hyvärinen, Noise-contrastive estimation of unnormalized statistical models, JMLR 13,
    2012 (the covariance); Prentice, Pyke, Logistic disease incidence models and case-control
    studies, Biometrika 66, 1979 (why the parameters' width is right and that of c is not).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_ebm.chains import Record
from pyro_ebm.chains.record import to_numpy
from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.distributions.layers import num_reinterpreted
from pyro_ebm.errors import ConditionalEnergyError
from pyro_ebm.infer.bayes.data_structure import check_model, observed_ebms
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.infer.bayes.prior_runs import NUM_DRAWS, prior_runs
from pyro_ebm.infer.bayes.properness import check_proper
from pyro_ebm.infer.noise.nce import NCE
from pyro_ebm.infer.scoring.conditional import check_rows
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.infer.scoring.frozen import FrozenObjective
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.targets.target import Target
from pyro_ebm.normalizers.chain_size import size_of_mean
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.rank_rhat import worst_rhat
from pyro_ebm.poutine.aside import aside
from pyro_ebm.poutine.surrogate import surrogate, surrogate_of
from pyro_ebm.poutine.whole_data import check_ebms_unscaled, check_whole

Arrays = dict[str, NDArray[Any]]

MAX_DIM = 10
MAX_ACCURACY = 0.9
MAX_NOISE_SPREAD = 0.5  # of a posterior sd; with ten noise draws it is a quarter
ENOUGH_ROWS = 10  # for each coordinate; the width is right as rows grow in number
MAX_RHAT = 1.05  # of short chains: R-hat itself errs by a hundredth
_INSTEAD = "generalized_posterior, or mcmc.Exchange for an exponential family with draws or sweeps"


class _Site(NamedTuple):
    """What one noise set says of a site at the centre of its posterior.

    Args:
        num_rows: Rows that count.
        dim: Coordinates of a row.
        accuracy: How often data and as many noise draws are told apart, from .5 to 1.
        scale: What the deviation of c from its regression on the parameters is multiplied by.
    """

    num_rows: int
    dim: int
    accuracy: float
    scale: float


class _Set(NamedTuple):
    """Draws ``(chains, draws) + event_shape`` under one noise set.

    Args:
        draws: By latent.
        stats: Of the chains.
        sites: What the noise says of every site.
        free: Sites whose log Z is drawn.
        dim: Unconstrained coordinates, those log Z's included.
        rhat: The largest of the chains.
        seconds: What they took.
    """

    draws: Arrays
    stats: Arrays
    sites: dict[str, _Site]
    free: tuple[str, ...]
    dim: int
    rhat: float
    seconds: float


def nce_posterior(
    model: Callable[..., Any],
    *args: Any,
    noise: Any = None,
    guide: Callable[..., Any] | None = None,
    num_noise: int = 10,
    num_sets: int = 5,
    num_samples: int = 250,
    warmup_steps: int = 250,
    num_chains: int = 8,
    disable_progbar: bool = True,
    **kwargs: Any,
) -> Posterior:
    r"""Samples the parameters of a model of independent rows whose log Z is out of reach.

    Args:
        model: A Pyro model whose EBM sites have rows in plates; latents of the model, hierarchical
            ones included, are what is sampled.
        *args: Its arguments, with the full data.
        noise: A normalized distribution on the support of the EBM, ``"gaussian"`` for one fitted
            to the data of every site, or ``None`` for the base; tails no lighter than those of the
            data.
        guide: Holds the noise of sites that differ in theirs, in sites of the same names.
        num_noise: :math:`\nu`, noise draws per datum, a whole number: a weight on fewer draws would
            understate their error.
        num_sets: K, how many times noise is drawn; at least 5 to know what it does.
        num_samples: Draws of each chain under each noise set.
        warmup_steps: Iterations that tune the chains of each noise set.
        num_chains: Chains under each noise set.
        disable_progbar: Hides the progress bars.
        **kwargs: Keyword arguments of the model.

    Returns:
        A :class:`~pyro_ebm.infer.bayes.posterior_result.Posterior` with ``num_sets * num_chains``
        chains, noise set by noise set, whose R-hat thus contains the spread between them. Log Z of
        site ``x`` is the latent ``x_log_normalizer``. ``record.attrs`` holds, in the order of a
        latent's elements, ``between_noise_sd_NAME`` and ``relative_between_noise_sd_NAME`` (in
        posterior sds; the chains' Monte Carlo error is part of both), and ``noise_accuracy_SITE``.

    Raises:
        TypeError: If the model is none.
        ValueError: If there is no EBM site, an energy is improper, or a site is one observation,
            scaled, or in a plate that takes some of its rows.
        ConditionalEnergyError: If rows need a log Z each, at draws of the prior or the posterior.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         law = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", law, obs=x)
        >>> _ = torch.manual_seed(0)
        >>> posterior = nce_posterior(model, torch.randn(50), noise=dist.Normal(0.0, 1.5),
        ...                           num_sets=1, num_samples=50, warmup_steps=50)
        >>> posterior.record.num_chains
        8
    """
    check_model(model, "an NCE posterior")
    call = _Call(model, args, kwargs)
    _check_rows(call)
    doubts = check_proper(model, args, kwargs)
    size = whole("num_samples", num_samples, least=4)
    ratio = whole("num_noise", num_noise, least=1)
    sets = []
    for _ in range(whole("num_sets", num_sets, least=1)):
        objective = NCE(ratio, noise)
        frozen = objective.freeze(model, *args, guide=guide, **kwargs)
        kernel = HMC(surrogate(model, frozen))
        mcmc = MCMC(
            kernel, size, warmup_steps, num_chains=num_chains, disable_progbar=disable_progbar
        )
        mcmc.run(*args, **kwargs)
        sets.append(_read(mcmc, call, frozen, objective))
    found = _pooled(sets, ratio)
    return replace(found, remarks=found.remarks + doubts)


class _Call(NamedTuple):
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


# --- one noise set


def _check_rows(call: _Call) -> None:
    """Looks at runs of the model, before any noise is asked whether it suits the data."""
    runs = prior_runs(call.model, call.args, call.kwargs)
    observed_ebms(runs[0])
    check_whole(runs[0])
    check_ebms_unscaled(runs[0], "an NCE posterior")
    for name, law, x in _sites_of(runs[0]):
        rows = rows_of(law, x)
        if rows.numel() <= 1:
            raise ValueError(
                f"nce_posterior: site {name!r} has batch_shape {tuple(rows)}: it is one "
                "observation, and NCE tells many independent rows from noise. Use mcmc.Exchange, "
                "or put independent rows into a plate"
            )

    for run in runs:
        _check_one_law(run)


def _sites_of(
    run: Trace, held: Collection[str] = ()
) -> list[tuple[str, EnergyDistribution, Tensor]]:
    """Name, law and data of the observed EBM sites of a run, without latents that are held."""
    sites = [(name, run.nodes[name]) for name in run.observation_nodes if name not in held]
    laws = [(name, unwrap(site["fn"]), site["value"]) for name, site in sites]
    return [(name, law, law.broadcast_value(x)) for name, law, x in laws if law is not None]


def _check_one_law(run: Trace, held: Collection[str] = ()) -> None:
    """Raises ``ConditionalEnergyError`` if rows of a run need a log Z each."""
    for name, law, x in _sites_of(run, held):
        if law.is_normalized:
            continue
        try:
            check_rows(name, law, x, "NCE", _INSTEAD)
        except ConditionalEnergyError as error:
            fn = run.nodes[name]["fn"]
            if not num_reinterpreted(fn):
                raise
            raise ConditionalEnergyError(
                f"{error}. What to_event makes one event are rows of their own to the energy: if "
                "only parameters of columns tell them apart, let the energy sum over the columns, "
                f"with event_shape={tuple(fn.event_shape)} and without to_event"
            ) from error


@torch.no_grad()
def _check_at_draws(call: _Call, target: Target, q: Tensor) -> None:
    """Looks at rows where the posterior is, which need not be where the prior is."""
    for values in map(target.constrain, q[:: -(-len(q) // NUM_DRAWS)].unsqueeze(1)):
        at = poutine.condition(call.model, {name: value[0] for name, value in values.items()})
        with aside():
            run = poutine.trace(at).get_trace(*call.args, **call.kwargs)
            _check_one_law(run, held=values.keys())


def _read(mcmc: MCMC, call: _Call, frozen: FrozenObjective, objective: NCE) -> _Set:
    target, positions = mcmc.positions()
    _check_at_draws(call, target, positions.flatten(0, 1))
    centre = target.constrain(positions.mean((0, 1))[None])
    values = {name: value[0] for name, value in centre.items()}
    sites = _at_centre(call, frozen, objective, values)
    free = tuple(frozen.free_log_normalizers())
    scales = {_name_of(site): sites[site].scale for site in free}
    draws = {name: to_numpy(value) for name, value in mcmc.get_samples().items()}
    draws |= _corrected(mcmc.get_samples(unconstrained=True), scales)
    kept = mcmc.diagnostics().items()
    stats = {name: to_numpy(value) for name, value in kept if name != "lp"}  # c has been moved
    rhat = worst_rhat(positions.movedim(1, 0))
    return _Set(draws, stats, sites, free, target.dim, rhat, mcmc.seconds)


def _name_of(site: str) -> str:
    return f"{site}_log_normalizer"


@torch.no_grad()
def _at_centre(
    call: _Call, frozen: FrozenObjective, objective: NCE, values: Mapping[str, Tensor]
) -> dict[str, _Site]:
    target = poutine.condition(surrogate(call.model, frozen), dict(values))
    trace = poutine.trace(target).get_trace(*call.args, **call.kwargs)
    found = {}
    for name in frozen.contrasts:
        site = trace.nodes[name]
        fn = surrogate_of(site["fn"])
        x = fn.p.broadcast_value(fn.without_padding(site["value"]))
        ratios = objective.log_ratios(fn.p, x, frozen.contrasts[name])
        log_z = values.get(_name_of(name), fn.p.log_normalizer_value())
        ratios = ratios.double() - (0.0 if log_z is None else log_z)
        found[name] = _seen(fn.p, ratios, fn.mask)
    return found


def _seen(p: EnergyDistribution, ratios: Tensor, mask: Tensor | None) -> _Site:
    """Reads :math:`-U - c - log q`, ``(1 + nu,) + rows``: data first, then noise."""
    if mask is not None:
        ratios = ratios[:, mask.expand(ratios.shape[1:])]
    data, noise = ratios[0].flatten(), ratios[1:].flatten()
    told = 0.5 * (data > 0).double().mean() + 0.5 * (noise < 0).double().mean()
    sides = [torch.sigmoid(side - math.log(len(ratios) - 1)) for side in (data, noise)]
    information = sum((side * (1 - side)).sum() for side in sides)
    scatter = sum(side.var() * len(side) for side in sides)
    dim = p.event_shape.numel()
    return _Site(len(data), dim, float(told), float((scatter / information) ** 0.5))


def _corrected(unconstrained: Mapping[str, Tensor], scales: Mapping[str, float]) -> Arrays:
    """Every c with its deviation from the regression on the parameters scaled."""
    rows = next(iter(unconstrained.values())).shape[:2].numel()
    flat = {name: value.double().reshape(rows, -1) for name, value in unconstrained.items()}
    parameters = [value for name, value in flat.items() if name not in scales]
    design = torch.cat([torch.ones_like(next(iter(flat.values()))[:, :1]), *parameters], 1)
    corrected = {}
    for name, scale in scales.items():
        c = flat[name]
        fitted = design @ torch.linalg.lstsq(design, c).solution
        like = unconstrained[name]
        corrected[name] = to_numpy((fitted + scale * (c - fitted)).reshape(like.shape).to(like))
    return corrected


# --- all noise sets


def _pooled(sets: Sequence[_Set], num_noise: int) -> Posterior:
    draws = {name: np.concatenate([one.draws[name] for one in sets]) for name in sets[0].draws}
    stats = {name: np.concatenate([one.stats[name] for one in sets]) for name in sets[0].stats}
    spread = _spread(sets)
    accuracy = {s: float(np.mean([one.sites[s].accuracy for one in sets])) for s in sets[0].sites}
    attrs: dict[str, Any] = {"calibration": "asymptotic"}
    attrs |= {"num_noise": num_noise, "num_noise_sets": len(sets)}
    for name, (between, relative) in spread.items():
        attrs[f"between_noise_sd_{name}"] = between.tolist()
        attrs[f"relative_between_noise_sd_{name}"] = relative.tolist()
    attrs |= {f"noise_accuracy_{site}": value for site, value in accuracy.items()}
    seconds = sum(one.seconds for one in sets)
    record = Record(draws, stats, sampler="HMC", seconds=seconds, attrs=attrs)
    moves = _spread_remarks(sets, spread, accuracy)
    remarks = (*_remarks(sets, accuracy), *moves, *_known(sets[0]))
    return Posterior(record, "NCE", _reasons(sets[0]), remarks, calibration="asymptotic")


def _spread(sets: Sequence[_Set]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Per latent the sd of its mean between noise sets, absolute and in posterior sds.

    Entries that stand still by construction, as those of a Cholesky factor, have neither.
    """
    if len(sets) == 1:
        return {}
    found = {}
    for name in sets[0].draws:
        values = [one.draws[name].astype(np.float64) for one in sets]
        between = np.std([v.mean((0, 1)) for v in values], axis=0, ddof=1).reshape(-1)
        within = np.sqrt(np.mean([v.var((0, 1)) for v in values], axis=0)).reshape(-1)
        relative = np.divide(between, within, out=np.zeros_like(between), where=within > 0)
        found[name] = (between, relative)
    return found


def _reasons(one: _Set) -> tuple[str, ...]:
    rows = ", ".join(
        f"{site.num_rows} rows (d = {site.dim}) at site {name!r}"
        for name, site in one.sites.items()
    )
    return (f"log Z is not needed to tell data from noise: {rows}.",)


def _remarks(sets: Sequence[_Set], accuracy: Mapping[str, float]) -> list[str]:
    found = []
    if len(sets) == 1:
        found.append("One noise set says nothing of what the noise does: give num_sets >= 5.")
    for name, value in accuracy.items():
        dim = sets[0].sites[name].dim
        if value >= MAX_ACCURACY:
            found.append(
                f"The noise of site {name!r} is told from the data in {value:.0%} of cases, so "
                "that few draws say anything: take noise closer to the data."
            )
        if dim > MAX_DIM:
            found.append(
                f"Site {name!r} has {dim} coordinates: beyond {MAX_DIM} the posterior is much "
                "wider than by Bayes' rule."
            )
    found += _on_few_rows(sets[0])
    rhat = max(one.rhat for one in sets)
    if not rhat < MAX_RHAT:
        found.append(f"Chains under one noise set disagree (R-hat {rhat:.2f}): draw more.")
    return found


def _on_few_rows(one: _Set) -> list[str]:
    num_rows = sum(site.num_rows for site in one.sites.values())
    if num_rows >= ENOUGH_ROWS * one.dim:
        return []
    return [
        f"There are {num_rows} rows for {one.dim} latents and log Z's, and the width is right for "
        f"many rows only: with fewer than {ENOUGH_ROWS} for each it is rough."
    ]


def _spread_remarks(
    sets: Sequence[_Set],
    spread: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    accuracy: Mapping[str, float],
) -> list[str]:
    """One sentence on the number that the noise moves most, with a remedy where it is too much."""
    if not spread:
        return []
    largest, name, entry = max(
        (float(value), name, entry)
        for name, (_, relative) in spread.items()
        for entry, value in enumerate(relative)
    )
    text = f"Between noise sets the mean of {name!r} moves by {largest:.2f} posterior sds"
    if largest <= MAX_NOISE_SPREAD:
        return [f"{text}."]
    if _monte_carlo_error(sets, name, entry) ** 2 > 0.5 * largest**2:
        return [f"{text}, most of it by chains that are too short: draw more."]
    if max(accuracy.values()) >= MAX_ACCURACY:
        return [f"{text}: take noise closer to the data."]
    return [f"{text}: raise num_noise."]


def _monte_carlo_error(sets: Sequence[_Set], name: str, entry: int) -> float:
    """By how many posterior sds chains alone move the mean of a number, root mean square."""
    draws = [one.draws[name] for one in sets]
    draws = [values.reshape(*values.shape[:2], -1)[..., entry] for values in draws]
    sizes = [size_of_mean(torch.as_tensor(values)) for values in draws]
    return float(np.mean(np.reciprocal(sizes)) ** 0.5)


def _known(one: _Set) -> list[str]:
    known = sorted(set(one.sites) - set(one.free))
    return [f"Log Z of site {name!r} is known: NUTS needs no noise for it." for name in known]
