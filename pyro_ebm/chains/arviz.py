"""Draws of any sampler as an ArviZ object, with what was observed and a log likelihood that counts.

ArviZ is imported only when asked for. Version 0.x gives ``InferenceData``, 1.x a ``DataTree``; the
groups and names inside are the same.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pyro_ebm.chains import _arviz_core as core
from pyro_ebm.chains.log_likelihood import PointwiseLogLikelihood, pointwise_log_likelihood
from pyro_ebm.chains.observations import Conditioned
from pyro_ebm.chains.record import Arrays, Record, as_record, to_numpy
from pyro_ebm.chains.runaway import find_runaways
from pyro_ebm.errors import ImproperEnergyWarning
from pyro_ebm.ops.held_draws import accounted

__all__ = ["summary", "to_arviz"]


def to_arviz(
    source: Any,
    *,
    model: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    prior: Mapping[str, Any] | None = None,
    posterior_predictive: Mapping[str, Any] | None = None,
    log_likelihood: bool | str | Sequence[str] = False,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    warmup: bool = False,
) -> Any:
    r"""Converts draws to ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x).

    ``posterior`` holds the draws on the constrained space; ``sample_stats`` the statistics under
    ArviZ's names, ``energy`` being the Hamiltonian and ``lp`` minus the potential on the
    unconstrained space. Both carry ``inference_library``, ``sampler``, ``adjusted`` (0 for chains
    without a Metropolis step), ``approximate`` and, if set, ``inverse_temperature`` as attributes.
    Predictive groups name in ``approximate_draws`` the sites that
    :meth:`EnergyDistribution.sample <pyro_ebm.EnergyDistribution.sample>` drew by a short chain.
    A ``/`` in a name is written as a dot.

    Args:
        source: A finished :class:`pyro.infer.MCMC` (any kernel), a run of this package's samplers,
            a :class:`~pyro_ebm.chains.Record`, or a dict of ``(chains, draws, ...)`` arrays.
        model: The Pyro model, for ``observed_data`` and ``log_likelihood``. With Pyro's MCMC the
            kernel's own model and the arguments of ``run`` are used if this is left out.
        args: Positional arguments of ``model``.
        kwargs: Keyword arguments of ``model``.
        prior: Draws of ``Predictive(model, num_samples=S)``: sites of the posterior go to
            ``prior``, others to ``prior_predictive``.
        posterior_predictive: Draws of ``Predictive``, one for each posterior draw.
        log_likelihood: Whether to add the pointwise log likelihood, in nats, of all data sites, or
            the names of those wanted. Where log Z is an estimate (a constant one, or made of held
            draws, ``anchored`` and ``base_importance``) the group's attribute ``elpd_mcse_logz`` is
            the error in nats that it adds to the elpd of these sites together; no ``se`` or ``dse``
            of ArviZ holds it.
        coords: Dimension to coordinate labels.
        dims: Variable to names of its dimensions after ``(chain, draw)``.
        warmup: Whether to add the warm-up's draws and statistics, as far as the source has them.

    Raises:
        MissingNormalizerError: If a log likelihood is asked of a site whose density is not
            normalized at every draw.
        ValueError: If a log likelihood is asked without a model, of a single dependent observation,
            of a scaled site or a part of the rows, at draws of a generalized posterior, or with
            latent sites that have no draws; if predictive draws do not match the posterior's; if a
            site has the name of a dimension, as ``chain`` and ``draw`` are.
        TypeError: If ``source`` is of another kind.

    Warns:
        ImproperEnergyWarning: If draws run away, as under an energy that is not integrable.
        UserWarning: If ``elpd_mcse_logz`` is above half a nat, or unknown, or an estimate of log Z
            is not to be trusted.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(4, 100, 3))
        >>> data = to_arviz({"x": draws})
        >>> data["posterior"]["x"].shape
        (4, 100, 3)
    """
    record = as_record(source)
    _warn_of_runaways(record)
    groups = _sampled_groups(record, warmup=warmup)
    conditioned = _conditioned(source, record, model, args, kwargs)
    of_scores: dict[str, Any] = {}
    if conditioned is not None:
        groups["observed_data"] = conditioned.observed_data()
    if log_likelihood is not False:
        scores = _log_likelihood(record, conditioned, wanted=log_likelihood)
        shape = record.num_chains, record.num_samples
        groups["log_likelihood"] = core.by_chain("log_likelihood", scores.values, *shape)
        if scores.mcse_log_z is not None:
            of_scores["elpd_mcse_logz"] = scores.mcse_log_z
        dims = _without_masked(dims, groups)
    groups |= _predictive_groups(record, prior, posterior_predictive)
    attrs = {**_attrs_of_groups(record, groups, conditioned), "log_likelihood": of_scores}
    return core.build(import_arviz(), groups, coords=coords, dims=dims, attrs=attrs)


def summary(source: Any) -> Any:
    """Returns a ``pandas.DataFrame`` with a row for every scalar of the posterior.

    Columns: mean, sd, mcse_mean, ess_bulk, ess_tail, r_hat. R-hat and both effective sample sizes
    are ArviZ's rank-normalized ones; ``nan`` where they do not exist (constant or non-finite draws,
    one chain). Which quantiles the tail is, the installed ArviZ decides. Where a record carries the
    error that an anchored log Z adds to the means, it is a column ``mcse_logz``.

    Args:
        source: What :func:`to_arviz` takes.

    Example:
        >>> import numpy as np
        >>> table = summary({"x": np.random.default_rng(0).normal(size=(4, 500, 2))})
        >>> list(table.index)
        ['x[0]', 'x[1]']
        >>> bool((table["r_hat"] < 1.02).all())
        True
    """
    record = as_record(source)
    table = table_of(record.draws)
    if "mcse_logz" in record.attrs:
        errors = {core.safe_name(k): v for k, v in record.attrs["mcse_logz"].items()}
        table["mcse_logz"] = [errors.get(name, float("nan")) for name in table.index]
    return table


def table_of(draws: Arrays) -> Any:
    """Returns the summary table of ``(chains, draws, ...)`` arrays."""
    return core.summary_table(import_arviz(), draws)


def import_arviz() -> Any:
    """Returns the ``arviz`` module; its announcement of a coming major version is muted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    return arviz


def _warn_of_runaways(record: Record) -> None:
    for name, how in find_runaways(record.draws).items():
        warnings.warn(
            f"site {name!r} {how}: its energy is probably not integrable there. Confine it (a base "
            "distribution does), or standardize x if this is its natural scale",
            ImproperEnergyWarning,
            stacklevel=3,
        )


def _sampled_groups(record: Record, *, warmup: bool) -> dict[str, Arrays]:
    groups = {
        "posterior": record.draws,
        "sample_stats": core.conventional_stats(record.sample_stats),
    }
    if warmup:
        groups["warmup_posterior"] = record.warmup_draws
        groups["warmup_sample_stats"] = core.conventional_stats(record.warmup_stats)
    return groups


def _conditioned(
    source: Any,
    record: Record,
    model: Callable[..., Any] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> Conditioned | None:
    """Binds the model given, or else the one that the source was run with, to the draws."""
    if model is None:
        model = getattr(getattr(source, "kernel", None), "model", None)
        if not args and not kwargs:
            args, kwargs = getattr(source, "_args", None) or (), getattr(source, "_kwargs", None)
    return None if model is None else Conditioned(model, args, kwargs or {}, record.draws)


def _log_likelihood(
    record: Record, conditioned: Conditioned | None, *, wanted: bool | str | Sequence[str]
) -> PointwiseLogLikelihood:
    if conditioned is None:
        raise ValueError("log_likelihood needs the model: pass model=, args= and kwargs=")
    if "calibration" in record.attrs:
        raise ValueError(
            "log_likelihood: these draws are of a generalized posterior, out of which no row is "
            "taken by dividing by its likelihood, so that az.loo would be no elpd: compare losses "
            "on held-out rows, or draw by Bayes' rule"
        )
    listed = [wanted] if isinstance(wanted, str) else wanted
    names = None if isinstance(listed, bool) else list(listed)
    with accounted():  # its error is told beside it
        return pointwise_log_likelihood(conditioned, names)


def _without_masked(
    dims: Mapping[str, Sequence[str]] | None, groups: Mapping[str, Arrays]
) -> dict[str, Sequence[str]]:
    """Drops the dimension names of sites whose masked rows are not in the log likelihood."""
    scores, data = groups["log_likelihood"], groups["observed_data"]
    same = {k: s.shape[2:] == data[k].shape[: s.ndim - 2] for k, s in scores.items()}
    return {name: names for name, names in (dims or {}).items() if same.get(name, True)}


def _predictive_groups(
    record: Record,
    prior: Mapping[str, Any] | None,
    posterior_predictive: Mapping[str, Any] | None,
) -> dict[str, Arrays]:
    before = {name: to_numpy(x)[None] for name, x in (prior or {}).items()}
    after = {name: to_numpy(x) for name, x in (posterior_predictive or {}).items()}
    shape = record.num_chains, record.num_samples
    return {
        "prior": {name: x for name, x in before.items() if name in record.draws},
        "prior_predictive": {name: x for name, x in before.items() if name not in record.draws},
        "posterior_predictive": core.by_chain("posterior_predictive", after, *shape),
    }


def _attrs_of_groups(
    record: Record, groups: Mapping[str, Arrays], conditioned: Conditioned | None
) -> dict[str, dict[str, Any]]:
    """Attributes of the run for what was sampled, and a word on draws that short chains made."""
    sampled = [group for group in groups if group.endswith(("posterior", "sample_stats"))]
    attrs = {group: _attrs(record) for group in sampled}
    short = conditioned.sites_drawn_by_short_chains() if conditioned is not None else []
    for group in ("prior", "prior_predictive", "posterior_predictive"):
        names = [name for name in groups.get(group, {}) if name in short]
        if names:
            attrs[group] = {"approximate_draws": ", ".join(names)}
    return attrs


def _attrs(record: Record) -> dict[str, Any]:
    """Returns attributes that NetCDF can hold: no booleans, nothing unset."""
    attrs: dict[str, Any] = {"inference_library": "pyro_ebm", **record.metadata()}
    attrs |= {"sampling_time": attrs.pop("seconds"), **attrs.pop("attrs")}
    with suppress(PackageNotFoundError):  # run from a source tree
        attrs["inference_library_version"] = version("pyro-ebm")
    plain = {k: int(v) if isinstance(v, bool) else v for k, v in attrs.items()}
    plain = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in plain.items()}
    return {k: v for k, v in plain.items() if v is not None}
