r"""A posterior over the parameters of unnormalized models, by the way that the data leave open.

In this order, exact ways first:

1. *log Z known* in closed form, or a sum over few states: Hamiltonian Monte Carlo;
2. *exact draws of the model*: exchange, group by group in a hierarchy;
3. *a kernel for the model*: exchange with auxiliary draws by sweeps, judged by ACD and AIKS;
4. *independent rows of few continuous dims*: the NCE posterior;
5. *anything else*: a generalized posterior by score matching or pseudo-likelihood, calibrated by
   the rows, or by simulation where there is but one dependent observation.

Contrastive ways need rows: of one lattice or network there is nothing to tell from noise, and one
log Z for all rows is wrong where every row has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pyro_ebm.chains import summary
from pyro_ebm.infer.anchored_posterior import anchored_posterior
from pyro_ebm.infer.data_structure import DataStructure, SiteStructure, data_structure
from pyro_ebm.infer.enumerated import Enumerated
from pyro_ebm.infer.generalized_bayes import generalized_posterior
from pyro_ebm.infer.nce_posterior import nce_posterior
from pyro_ebm.infer.posterior_result import Posterior
from pyro_ebm.infer.properness import check_proper
from pyro_ebm.infer.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.score_matching import ScoreMatching
from pyro_ebm.mcmc import HMC, MCMC, Exchange, GroupedExchange, Kernel
from pyro_ebm.mcmc.exchange_diagnostics import exchange_diagnostics
from pyro_ebm.poutine import surrogate

MOST_TERMS = 2**18  # energies in the sums for log Z of one draw
MOST_DIMS = 10  # of an event that noise is told from
LARGEST_RHAT = 1.05  # of many short chains: about sqrt(1 + 1 / effective draws of a chain)
LEAST_ESS = 400


def posterior(
    model: Callable[..., Any],
    *args: Any,
    method: str = "auto",
    num_samples: int = 500,
    warmup_steps: int = 500,
    num_chains: int = 64,
    disable_progbar: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Returns draws of a model's latents, with the reasons for how they were made.

    Args:
        model: A Pyro model with observed EBM sites.
        *args: Its arguments, with the full data.
        method: ``"auto"``, or ``"exact"``, ``"exchange"``, ``"anchored"``, ``"nce"`` or
            ``"generalized"``; each of them has more options where it is at home:
            :class:`~pyro_ebm.mcmc.HMC`, :class:`~pyro_ebm.mcmc.Exchange`,
            :func:`anchored_posterior`, :func:`nce_posterior`, :func:`generalized_posterior`.
        num_samples: Draws of a chain.
        warmup_steps: Iterations of a chain before them.
        num_chains: Chains, all in one batch.
        disable_progbar: Hides the progress bar.
        **kwargs: Keyword arguments of the model.

    Returns:
        A :class:`Posterior`; printed, it explains itself.

    Raises:
        ValueError: If the model observes no EBM, an energy is improper, or the method is unknown or
            cannot serve these data; the sentence says which can.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.ops.constraints import spins
        >>> def model(x):
        ...     pull = pyro.sample("pull", dist.Normal(torch.tensor(0.0), 1.0))
        ...     law = EnergyDistribution(lambda s: -pull * s.prod(-1), support=spins,
        ...                              event_shape=(3,))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", law, obs=x)
        >>> x = torch.ones(20, 3)
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> print(posterior(model, x, num_samples=100, warmup_steps=100))
        exact log Z: 64 chains of 100 draws
          because: the data of site 'x' are independent rows (20) of one law.
          because: log Z of site 'x' is a sum over 8 states.
    """
    run = _Run(model, args, kwargs, num_samples, warmup_steps, num_chains, disable_progbar)
    structure = data_structure(model, *args, **kwargs)
    doubts = check_proper(model, args, kwargs)
    name = route_of(structure) if method == "auto" else method
    if name not in _ROUTES:
        raise ValueError(f"method must be 'auto' or one of {sorted(_ROUTES)}, got {method!r}")
    found = _ROUTES[name](run, structure)
    told = tuple(_sentence(site) for site in structure.sites)
    # Of an NCE posterior R-hat contains what the noise sets change, of which it speaks itself.
    mixing = () if name == "nce" else _mixing_remarks(found)
    return replace(found, reasons=told + found.reasons, remarks=found.remarks + mixing + doubts)


@dataclass(frozen=True)
class _Run:
    """What is to be run, and for how long."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_samples: int
    warmup_steps: int
    num_chains: int
    disable_progbar: bool

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "num_samples": self.num_samples,
            "warmup_steps": self.warmup_steps,
            "num_chains": self.num_chains,
        }

    def by(self, kernel: Kernel) -> MCMC:
        mcmc = MCMC(kernel, **self.sizes, disable_progbar=self.disable_progbar)
        mcmc.run(*self.args, **self.kwargs)
        return mcmc


# --- which way


def route_of(structure: DataStructure) -> str:
    """Returns the method that ``"auto"`` takes for data of this structure."""
    sites = structure.sites
    if sum(site.num_terms for site in sites) <= MOST_TERMS:
        return "exact"
    if all(site.can_be_exchanged for site in sites):
        return "exchange"
    return "nce" if len(sites) == 1 and _is_for_noise(sites[0]) else "generalized"


def _is_for_noise(site: SiteStructure) -> bool:
    few = site.is_continuous and site.law.event_shape.numel() <= MOST_DIMS
    return few and site.has_noise and site.kind == "independent rows"


def _sentence(site: SiteStructure) -> str:
    what = {
        "independent rows": f"are independent rows ({site.num_rows}) of one law",
        "conditional": f"are rows ({site.num_rows}) with a law each",
        "hierarchical": f"lie in groups of plate {', '.join(map(repr, site.plates))}",
        "one observation": "are one dependent observation",
    }
    return f"the data of site {site.name!r} {what[site.kind]}."


def _mixing_remarks(found: Posterior) -> tuple[str, ...]:
    table = summary(found.record)
    if bool(table[["r_hat", "ess_bulk"]].isna().any(axis=None)):
        return (
            f"{found.record.num_samples} draws of {found.record.num_chains} chains are too few to "
            "tell whether they have mixed, or some stand still: use more num_samples.",
        )
    worst, least = table["r_hat"].idxmax(), table["ess_bulk"].idxmin()
    remarks = []
    if table["r_hat"][worst] > LARGEST_RHAT:
        remarks.append(
            f"the chains are too short: R-hat of {worst} is {table['r_hat'][worst]:.3f}, and "
            f"should be under {LARGEST_RHAT}; use more warmup_steps and num_samples."
        )
    if table["ess_bulk"][least] < LEAST_ESS:
        remarks.append(
            f"the draws of {least} are worth {table['ess_bulk'][least]:.0f} independent ones; "
            f"{LEAST_ESS} are the least for intervals."
        )
    return tuple(remarks)


# --- the ways


def _exact(run: _Run, structure: DataStructure) -> Posterior:
    for site in structure.sites:
        if site.num_terms > MOST_TERMS:
            raise ValueError(
                f"method 'exact' sums log Z over states, and site {site.name!r} would take "
                f"{site.num_terms:.3g} terms at every draw, more than {MOST_TERMS}: use 'auto', or "
                "give the distribution a log_normalizer"
            )
    if not structure.sites:
        reasons: tuple[str, ...] = ("log Z of every EBM site is known at every draw.",)
        return Posterior(run.by(HMC(run.model)).record, "exact log Z", reasons)
    reasons = tuple(
        f"log Z of site {s.name!r} is a sum over {s.num_terms / s.law.batch_shape.numel():.0f} "
        "states."
        for s in structure.sites
    )
    mcmc = run.by(HMC(surrogate(run.model, Enumerated(MOST_TERMS))))
    return Posterior(mcmc.record, "exact log Z", reasons)


def _exchange(run: _Run, structure: DataStructure) -> Posterior:
    if not structure.sites:
        raise ValueError("log Z of every EBM site is known: use method='exact'")
    plate = structure.groups
    kernel = Exchange(run.model) if plate is None else GroupedExchange(run.model, plate)
    mcmc = run.by(kernel)
    reasons = () if plate is None else (f"groups of plate {plate!r} are accepted one by one.",)
    together = (
        (
            "sites lie in groups of several plates, and all are accepted together: where mixing is "
            "slow, use GroupedExchange with one of them.",
        )
        if plate is None and structure.kind == "hierarchical"
        else ()
    )
    if kernel.adjusted:
        return Posterior(
            mcmc.record, "exchange", ("the model can be drawn from exactly.", *reasons), together
        )
    verdict = exchange_diagnostics(mcmc)
    remarks = (
        *together,
        str(verdict),
        "an exact sampler (is_sampleable and sample() of the energy) would make this exact.",
    )
    reasons = ("the energies have kernels of their own, but no exact sampler.", *reasons)
    return Posterior(mcmc.record, "exchange by sweeps", reasons, remarks)


def _anchored(run: _Run, structure: DataStructure) -> Posterior:
    found = anchored_posterior(
        run.model, *run.args, **run.sizes, disable_progbar=run.disable_progbar, **run.kwargs
    )
    remark = "the error of log Z is the column mcse_logz of the summary; exchange has none."
    return replace(found, remarks=(*found.remarks, remark))


def _nce(run: _Run, structure: DataStructure) -> Posterior:
    for site in structure.sites:
        if site.num_rows == 1:
            raise ValueError(
                "method 'nce' tells many independent rows from noise, and the data of site "
                f"{site.name!r} are one observation: use method='auto'"
            )
    num_sets = 5
    sizes = {**run.sizes, "num_chains": -(-run.num_chains // num_sets), "num_sets": num_sets}
    noise = None if any(site.law.base is not None for site in structure.sites) else "gaussian"
    found = nce_posterior(
        run.model,
        *run.args,
        noise=noise,
        **sizes,
        disable_progbar=run.disable_progbar,
        **run.kwargs,
    )
    return replace(
        found,
        reasons=("log Z is unknown, and data can be told from noise.", *found.reasons),
        remarks=(
            *found.remarks,
            "an energy linear in its parameters with an exact sampler could go by exchange.",
        ),
    )


def _generalized(run: _Run, structure: DataStructure) -> Posterior:
    continuous = {site.is_continuous for site in structure.sites}
    if len(continuous) > 1:
        raise ValueError(
            "continuous and discrete EBM sites in one model need a loss each, and no calibration "
            "of several is implemented: sample surrogate(model, {site: loss, ...}) by mcmc.HMC"
        )
    loss = ScoreMatching() if continuous == {True} else PseudoLikelihood()
    found = generalized_posterior(
        run.model,
        *run.args,
        loss=loss,
        **run.sizes,
        disable_progbar=run.disable_progbar,
        **run.kwargs,
    )
    reason = f"log Z is unknown, and {type(loss).__name__} does without it."
    return replace(found, reasons=(reason, *found.reasons))


_ROUTES: dict[str, Callable[[_Run, DataStructure], Posterior]] = {
    "exact": _exact,
    "exchange": _exchange,
    "anchored": _anchored,
    "nce": _nce,
    "generalized": _generalized,
}
