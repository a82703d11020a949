"""The ways to a posterior: what each runs, refuses, and says of itself.

They are named as the ``method`` of :func:`~pyro_ebm.infer.bayes.posterior.posterior`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyro_ebm.infer.bayes.anchored_posterior import anchored_posterior
from pyro_ebm.infer.bayes.data_structure import DataStructure, SiteStructure
from pyro_ebm.infer.bayes.enumerated import Enumerated
from pyro_ebm.infer.bayes.generalized_bayes import generalized_posterior
from pyro_ebm.infer.bayes.integration import Integrals, integrals_of
from pyro_ebm.infer.bayes.nce_posterior import nce_posterior
from pyro_ebm.infer.bayes.posterior_remarks import how_summed, of_sites, off_the_nodes, why_together
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.infer.bayes.prior_runs import prior_runs
from pyro_ebm.infer.bayes.sphere_noise import uniform_directions
from pyro_ebm.infer.discrete.discrete_fisher import DiscreteFisher
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.mcmc import HMC, MCMC, Exchange, GroupedExchange, Kernel, Sweeps
from pyro_ebm.mcmc.exchange.exchange_diagnostics import (
    LONG_SWEEPS,
    ExchangeDiagnostics,
    exchange_diagnostics,
)
from pyro_ebm.ops.coupling_from_the_past import NotCoupledError
from pyro_ebm.ops.ladders import ladder_of
from pyro_ebm.poutine import surrogate
from pyro_ebm.poutine.whole_data import check_ebms_unscaled

MAX_TERMS = 2**18  # energies in the sums for log Z of one draw
FEW_DRAWS = 200  # to be judged by auxiliary draws of many sweeps, which take long
_WITHOUT_LOSS = {
    "surface": "directions on a sphere",
    "mixed": "tables with continuous and discrete columns",
}
_KNOWN = "log Z of every EBM site is known: use method='exact'"


@dataclass(frozen=True)
class Run:
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
        """How much is drawn, as arguments."""
        return {
            "num_samples": self.num_samples,
            "warmup_steps": self.warmup_steps,
            "num_chains": self.num_chains,
        }

    def by(self, kernel: Kernel) -> MCMC:
        """Returns the finished chains of a kernel."""
        mcmc = MCMC(kernel, **self.sizes, disable_progbar=self.disable_progbar)
        starts = None if self.nodes is None else self.nodes.begin(self.num_chains)
        mcmc.run(*self.args, initial_params=starts, **self.kwargs)
        return mcmc

    def integrals(self, structure: DataStructure, nodes: int, dim: int) -> Integrals | None:
        """Returns nodes for log Z of the continuous sites, if there are both."""
        rest = [s for s in structure.sites if not s.can_be_integrated]
        if not structure.is_integral or any(s.num_terms > MAX_TERMS for s in rest):
            return None
        call = (self.model, self.args, self.kwargs)
        return integrals_of(*call, structure.sites, max_nodes=nodes, max_dim=dim)


def _exact(run: Run, structure: DataStructure) -> Posterior:
    (traced,) = prior_runs(run.model, run.args, run.kwargs, num_draws=1)
    check_ebms_unscaled(traced, "an exact posterior")
    if not structure.sites:
        reasons: tuple[str, ...] = ("log Z of every EBM site is known at every draw.",)
        return Posterior(run.by(HMC(run.model)).record, "exact log Z", reasons)
    _check_summable(structure, run)
    objective = run.nodes.objective if run.nodes else Enumerated.of(structure.sites)
    mcmc = run.by(HMC(surrogate(run.model, objective)))
    reasons = of_sites("log Z of", structure.sites, lambda site: how_summed(site, run.nodes))
    remarks = off_the_nodes(mcmc, run.nodes)
    return Posterior(mcmc.record, "exact log Z", reasons, remarks, scored_by=objective)


def _check_summable(structure: DataStructure, run: Run) -> None:
    for site in structure.sites:
        if site.num_terms > MAX_TERMS and not site.can_be_integrated:
            raise ValueError(
                f"method 'exact' sums log Z over states, and site {site.name!r} would take "
                f"{site.num_terms:.3g} terms at every draw, more than {MAX_TERMS}: use 'auto', or "
                "give the distribution a log_normalizer"
            )
    if structure.is_integral and run.nodes is None:
        names = [site.name for site in structure.sites if site.can_be_integrated]
        raise ValueError(
            f"method 'exact' integrates log Z of {names} by fixed nodes, and no {MAX_TERMS} hold "
            "wherever the posterior is (heavy tails, or scales that differ too much): use 'auto', "
            "or give the distribution a log_normalizer"
        )


def _exchange(run: Run, structure: DataStructure) -> Posterior:
    if not structure.sites:
        raise ValueError(f"method 'exchange' does without log Z, and {_KNOWN}")
    why = "the energies have kernels of their own, but no exact sampler."
    better = "an exact sampler (is_sampleable and sample() of the energy) would make this exact."
    try:
        mcmc = run.by(_exchange_kernel(run, structure))
    except NotCoupledError:  # not of single draws: those left out would bend the law of the others
        if not all(site.law.energy_sweeps for site in structure.sites):
            raise
        mcmc = run.by(_exchange_kernel(run, structure, auxiliary=Sweeps()))
        why = "the energies have exact samplers, which take too long at some couplings."
        better = "a prior that leaves out couplings beyond the critical one would make this exact."
    plate, together = structure.groups, why_together(structure)
    one_by_one = () if plate is None else (f"groups of plate {plate!r} are accepted one by one.",)
    if mcmc.kernel.adjusted:
        reasons = ("the model can be drawn from exactly.", *one_by_one)
        return Posterior(mcmc.record, "exchange", reasons, together)
    found = _judged(mcmc)
    record, remarks = found.attached_to(mcmc.record), (*together, str(found), better)
    return Posterior(record, "exchange by sweeps", (why, *one_by_one), remarks)


def _exchange_kernel(run: Run, structure: DataStructure, **options: Any) -> Kernel:
    if structure.groups is None:
        return Exchange(run.model, **options)
    return GroupedExchange(run.model, structure.groups, **options)


def _judged(mcmc: MCMC) -> ExchangeDiagnostics:
    """The verdict on draws by sweeps, by exact draws if these come to an end, or many sweeps."""
    try:
        return exchange_diagnostics(mcmc)
    except NotCoupledError:
        sweeps = Sweeps(LONG_SWEEPS)
        return exchange_diagnostics(mcmc, auxiliary=sweeps, max_draws=FEW_DRAWS)


def _anchored(run: Run, structure: DataStructure) -> Posterior:
    found = anchored_posterior(
        run.model, *run.args, **run.sizes, disable_progbar=run.disable_progbar, **run.kwargs
    )
    remark = "exchange has no error of log Z."
    return replace(found, remarks=(*found.remarks, remark))


def _nce(run: Run, structure: DataStructure) -> Posterior:
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
    found = nce_posterior(
        run.model,
        *run.args,
        noise=noise_for(structure.sites),
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


def noise_for(sites: Sequence[SiteStructure]) -> Any:
    """Returns what data of sites are told from, as ``noise`` of ``nce_posterior``.

    ``None`` for their bases, the uniform law where all are directions, or Gaussians for each.
    """
    if any(site.law.base is not None for site in sites):
        return None
    if all(site.measure == "surface" for site in sites):
        return uniform_directions(sites[0].value, sites[0].law.event_shape)
    return "gaussian"


def _generalized(run: Run, structure: DataStructure) -> Posterior:
    loss = _loss_for(structure)
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


def _loss_for(structure: DataStructure) -> ScoreMatching | PseudoLikelihood | DiscreteFisher:
    """A loss for the measure that the data refer to."""
    for site in structure.observed:
        if site.measure in _WITHOUT_LOSS:
            raise ValueError(
                f"a generalized posterior has no loss for {_WITHOUT_LOSS[site.measure]}, as at "
                f"site {site.name!r}: if its rows share one law, use nce_posterior(noise=...) with "
                "a normalized law on the same support, or give the distribution one as base= and "
                "use method='nce'; else give it a log_normalizer"
            )
    measures = {site.measure for site in structure.observed}
    if len(measures) > 1:
        raise ValueError(
            "continuous and discrete EBM sites in one model need a loss each, and no calibration "
            "of several is implemented: sample surrogate(model, {site: loss, ...}) by mcmc.HMC"
        )
    return ScoreMatching() if measures == {"lebesgue"} else _discrete_loss(structure)


def _discrete_loss(structure: DataStructure) -> PseudoLikelihood | DiscreteFisher:
    """Pseudo-likelihood, which keeps more of the data, where sites share a finite list of values.

    Counts and tables with lists of their own are for the discrete Fisher divergence.
    """
    laws = [site.law for site in structure.observed]
    ladders = [ladder_of(law.support, law.event_shape) for law in laws]
    if any(ladder is not None and ladder.shared_num() < 2 for ladder in ladders):
        return DiscreteFisher()
    return PseudoLikelihood()


WAYS: dict[str, Callable[[Run, DataStructure], Posterior]] = {
    "exact": _exact,
    "exchange": _exchange,
    "anchored": _anchored,
    "nce": _nce,
    "generalized": _generalized,
}
