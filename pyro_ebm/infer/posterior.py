r"""A posterior over the parameters of unnormalized models, by the way that the data leave open.

In this order, exact ways first:

1. *log Z known* in closed form, a sum over few states, or an integral over at most two dims, or
   three if ``method="exact"`` asks for it: Hamiltonian Monte Carlo;
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
from pyro_ebm.infer.integration import Integrals, integrals_of
from pyro_ebm.infer.nce_posterior import nce_posterior
from pyro_ebm.infer.posterior_result import Posterior
from pyro_ebm.infer.properness import check_proper
from pyro_ebm.infer.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.score_matching import ScoreMatching
from pyro_ebm.mcmc import HMC, MCMC, Exchange, GroupedExchange, Kernel
from pyro_ebm.mcmc.exchange_diagnostics import exchange_diagnostics
from pyro_ebm.normalizers.quadrature import MAX_DIM
from pyro_ebm.poutine import surrogate

MOST_TERMS = 2**18  # energies in the sums for log Z of one draw
MOST_NODES = 2**15  # of an integral for log Z that is taken unasked
MOST_DIM = 2  # of such an integral: in three dims chains take hours
MOST_DIMS = 10  # of an event that noise is told from
LARGEST_RHAT = 1.05  # of many short chains: about sqrt(1 + 1 / effective draws of a chain)
LEAST_ESS = 400
_KNOWN = "log Z of every EBM site is known: use method='exact'"


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
        TypeError: If it is no model, or data on a continuous support are whole numbers.
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
    if method != "auto" and method not in _ROUTES:
        raise ValueError(f"method must be 'auto' or one of {sorted(_ROUTES)}, got {method!r}")
    name = route_of(structure) if method == "auto" else method
    limits = (MOST_NODES, MOST_DIM) if method == "auto" else (MOST_TERMS, MAX_DIM)
    integrals = run.integrals(structure, *limits) if name == "exact" else None
    if method == "auto" and integrals is None and structure.is_integral:
        name = route_of(structure, can_integrate=False)
    found = _ROUTES[name](replace(run, nodes=integrals), structure)
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
    nodes: Integrals | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "num_samples": self.num_samples,
            "warmup_steps": self.warmup_steps,
            "num_chains": self.num_chains,
        }

    def by(self, kernel: Kernel) -> MCMC:
        mcmc = MCMC(kernel, **self.sizes, disable_progbar=self.disable_progbar)
        starts = None if self.nodes is None else self.nodes.begin(self.num_chains)
        mcmc.run(*self.args, initial_params=starts, **self.kwargs)
        return mcmc

    def integrals(self, structure: DataStructure, nodes: int, dim: int) -> Integrals | None:
        """Nodes for log Z of the continuous sites, if there are such sites and such nodes."""
        rest = [s for s in structure.sites if not s.can_be_integrated]
        if not structure.is_integral or any(s.num_terms > MOST_TERMS for s in rest):
            return None
        call = (self.model, self.args, self.kwargs)
        return integrals_of(*call, structure.sites, max_nodes=nodes, max_dim=dim)


# --- which way


def route_of(structure: DataStructure, *, can_integrate: bool = True) -> str:
    """Returns the method that ``"auto"`` takes for data of this structure.

    Args:
        structure: The structure.
        can_integrate: Whether there are nodes for log Z of sites of few dims.
    """
    sites = structure.sites
    summed = [s for s in sites if not (can_integrate and s.can_be_integrated)]
    if sum(site.num_terms for site in summed) <= MOST_TERMS:
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
    if not structure.sites:
        reasons: tuple[str, ...] = ("log Z of every EBM site is known at every draw.",)
        return Posterior(run.by(HMC(run.model)).record, "exact log Z", reasons)
    _check_summable(structure, run)
    objective = Enumerated(MOST_TERMS) if run.nodes is None else run.nodes.objective
    mcmc = run.by(HMC(surrogate(run.model, objective)))
    reasons = tuple(_how_summed(site, run) for site in structure.sites)
    return Posterior(mcmc.record, "exact log Z", reasons, _off_the_nodes(mcmc, run))


def _check_summable(structure: DataStructure, run: _Run) -> None:
    for site in structure.sites:
        if site.num_terms > MOST_TERMS and not site.can_be_integrated:
            raise ValueError(
                f"method 'exact' sums log Z over states, and site {site.name!r} would take "
                f"{site.num_terms:.3g} terms at every draw, more than {MOST_TERMS}: use 'auto', or "
                "give the distribution a log_normalizer"
            )
    if structure.is_integral and run.nodes is None:
        names = [site.name for site in structure.sites if site.can_be_integrated]
        raise ValueError(
            f"method 'exact' integrates log Z of {names} by fixed nodes, and no {MOST_TERMS} hold "
            "wherever the posterior is (heavy tails, or scales that differ too much): use 'auto', "
            "or give the distribution a log_normalizer"
        )


def _how_summed(site: SiteStructure, run: _Run) -> str:
    if run.nodes is not None and site.name in run.nodes.objective.rules:
        dim, rule = site.law.event_shape.numel(), run.nodes.objective.rules[site.name]
        dims = "one dim" if dim == 1 else f"{dim} dims"
        return f"log Z of site {site.name!r} is an integral over {dims}, by {rule}."
    number = site.num_terms / site.law.batch_shape.numel()
    return f"log Z of site {site.name!r} is a sum over {number:.0f} states."


def _off_the_nodes(mcmc: MCMC, run: _Run) -> tuple[str, ...]:
    """A sentence if log Z is not held by its nodes a little beyond the draws."""
    if run.nodes is None or run.nodes.hold_beyond(mcmc.positions()[1][:, -1]):
        return ()
    return (
        "log Z is held by its nodes at all draws, but not half as far out again: tails are cut "
        "off there; give the distribution a log_normalizer to have them.",
    )


def _exchange(run: _Run, structure: DataStructure) -> Posterior:
    if not structure.sites:
        raise ValueError(f"method 'exchange' does without log Z, and {_KNOWN}")
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
    remark = "exchange has no error of log Z."
    return replace(found, remarks=(*found.remarks, remark))


def _nce(run: _Run, structure: DataStructure) -> Posterior:
    for site in structure.observed:
        if site.num_rows == 1:
            raise ValueError(
                "method 'nce' tells many independent rows from noise, and the data of site "
                f"{site.name!r} are one observation: use method='auto'"
            )
    if not structure.sites:
        raise ValueError(f"method 'nce' infers log Z from noise, and {_KNOWN}")
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
    continuous = {site.is_continuous for site in structure.observed}
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
    does = f"{type(loss).__name__} does without"
    if not structure.sites:
        return replace(
            found,
            reasons=(f"{does} log Z.", *found.reasons),
            remarks=(*found.remarks, f"{_KNOWN}, for the posterior by Bayes' rule."),
        )
    return replace(found, reasons=(f"log Z is unknown, and {does} it.", *found.reasons))


_ROUTES: dict[str, Callable[[_Run, DataStructure], Posterior]] = {
    "exact": _exact,
    "exchange": _exchange,
    "anchored": _anchored,
    "nce": _nce,
    "generalized": _generalized,
}
