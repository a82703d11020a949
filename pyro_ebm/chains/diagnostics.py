r"""One verdict on a run: did the chains mix, and can their sampler be believed?

Thresholds, all conventional: rank-normalized split :math:`\hat R < 1.01`; bulk and tail effective
sample size at least 400; no divergence; no tree cut off at its maximal depth; and for momentum
samplers, per chain,

.. math:: \mathrm{BFMI} = \frac{\sum_t (H_t - H_{t-1})^2}{\sum_t (H_t - \bar H)^2} \ge 0.3 ,

about 1 for a Gaussian, 2 for independent energies, small where fresh momenta cannot follow the
spread of energies. ``lp`` is judged like a coordinate: a chain may look mixed in each coordinate
and not in its density. None of this sees a mode that no chain has visited, a tempered target, the
bias of an unadjusted sampler, or a missing normalizer.

References:
    Vehtari, Gelman, Simpson, Carpenter, Buerkner, Rank-normalization, folding, and localization: an
    improved R-hat, Bayesian Analysis 16(2), 2021. arXiv:1903.08008.
    Betancourt, Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo, 2016.
    arXiv:1604.00695.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_ebm.chains.arviz import table_of
from pyro_ebm.chains.record import Arrays, Record, as_record
from pyro_ebm.chains.runaway import find_runaways

__all__ = ["Diagnosis", "Worst", "bfmi", "diagnose"]

MAX_RHAT = 1.01
MIN_ESS = 400.0
MIN_BFMI = 0.3


class Worst(NamedTuple):
    """The least favourable value of a diagnostic, and the quantity that has it."""

    value: float
    at: str

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.at})" if self.at else "undefined"


_UNDEFINED = Worst(float("nan"), "")


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; ``print`` it to read it.

    Args:
        num_chains: Number of chains.
        num_samples: Draws per chain.
        rhat: Largest R-hat.
        ess_bulk: Smallest bulk effective sample size, of all chains together.
        ess_tail: Smallest tail effective sample size.
        bfmi: One value per chain; empty if the sampler has no momentum.
        num_divergences: ``None`` if the sampler does not know.
        num_saturated: Transitions cut off at the maximal tree depth; ``None`` if not known.
        warnings: What is wrong and what may help.
        notes: What a reader should know but need not be wrong.
    """

    num_chains: int
    num_samples: int
    rhat: Worst
    ess_bulk: Worst
    ess_tail: Worst
    bfmi: tuple[float, ...] = ()
    num_divergences: int | None = None
    num_saturated: int | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no warning."""
        return not self.warnings

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "NOT ok"
        lines = [
            f"{self.num_chains} chains of {self.num_samples} draws: {verdict}",
            f"  R-hat       at most  {self.rhat}",
            f"  bulk ESS    at least {self.ess_bulk}",
            f"  tail ESS    at least {self.ess_tail}",
        ]
        if self.bfmi:
            lines.append(f"  BFMI        at least {min(self.bfmi):.3g}")
        if self.num_divergences is not None:
            lines.append(f"  divergences {self.num_divergences}")
        if self.num_saturated is not None:
            lines.append(f"  saturated trees {self.num_saturated}")
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines + [f"  note: {text}" for text in self.notes])


def diagnose(source: Any) -> Diagnosis:
    """Judges a run by R-hat, effective sample sizes, BFMI, divergences, depth and runaway draws.

    Args:
        source: What :func:`~pyro_ebm.chains.to_arviz` takes.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(4, 500))
        >>> found = diagnose({"x": x})
        >>> found.ok, found.rhat.at
        (True, 'x')
        >>> diagnose({"x": x + np.arange(4.0)[:, None]}).ok
        False
    """
    record = as_record(source)
    stats = record.sample_stats
    still, partly = _constant_sites(record.draws)
    rhat, ess_bulk, ess_tail = _worst_values(_judged(record, leave_out=still))
    energies = bfmi(stats["energy"]) if "energy" in stats else ()
    diverged, saturated = _count(stats, "diverging"), _count(stats, "reached_max_treedepth")
    warnings = [
        *_runaway_warnings(record),
        *_still_warnings(still),
        *_mixing_warnings(record, rhat, ess_bulk, ess_tail),
        *_sampler_warnings(record, energies, diverged, saturated),
    ]
    return Diagnosis(
        record.num_chains,
        record.num_samples,
        rhat,
        ess_bulk,
        ess_tail,
        bfmi=energies,
        num_divergences=diverged,
        num_saturated=saturated,
        warnings=warnings,
        notes=_notes(record, partly),
    )


def bfmi(energy: NDArray[Any]) -> tuple[float, ...]:
    """Returns the Bayesian fraction of missing information of every chain.

    Args:
        energy: Hamiltonians of shape ``(chains, draws)``, nats.

    Example:
        >>> import numpy as np
        >>> [round(value, 1) for value in bfmi(np.random.default_rng(0).normal(size=(2, 5000)))]
        [2.0, 2.0]
    """
    h = np.asarray(energy, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (np.diff(h) ** 2).mean(axis=1) / h.var(axis=1, ddof=1)
    return tuple(float(value) for value in values)


def _constant_sites(draws: Arrays) -> tuple[list[str], list[str]]:
    """Names of sites none of whose coordinates ever moves, and of those with some that do not."""
    fixed = {name: (x == x[:, :1]).all(axis=1).reshape(x.shape[0], -1) for name, x in draws.items()}
    still = [name for name, mask in fixed.items() if mask.all()]
    partly = [name for name, mask in fixed.items() if mask.all(axis=0).any() and name not in still]
    return still, partly


def _judged(record: Record, leave_out: list[str]) -> dict[str, NDArray[Any]]:
    """Draws of the sites that move, with ``lp`` beside them."""
    moving = {name: x for name, x in record.draws.items() if name not in leave_out}
    lp = record.sample_stats.get("lp")
    return moving if lp is None or "lp" in record.draws or not moving else {**moving, "lp": lp}


def _worst_values(draws: Arrays) -> tuple[Worst, Worst, Worst]:
    if not draws:
        return _UNDEFINED, _UNDEFINED, _UNDEFINED
    table = table_of(draws)
    return (
        _worst(table["r_hat"], largest=True),
        _worst(table["ess_bulk"], largest=False),
        _worst(table["ess_tail"], largest=False),
    )


def _worst(column: Any, *, largest: bool) -> Worst:
    known = column.dropna()
    if known.empty:
        return _UNDEFINED
    at = known.idxmax() if largest else known.idxmin()
    return Worst(float(known[at]), str(at))


def _count(stats: Arrays, name: str) -> int | None:
    return int(stats[name].sum()) if name in stats else None


def _runaway_warnings(record: Record) -> list[str]:
    return [
        f"{name} {how}: the energy is probably not integrable there"
        for name, how in find_runaways(record.draws).items()
    ]


def _still_warnings(still: list[str]) -> list[str]:
    return [
        f"{name} never moved: R-hat and ESS do not exist for a constant chain" for name in still
    ]


def _mixing_warnings(record: Record, rhat: Worst, ess_bulk: Worst, ess_tail: Worst) -> list[str]:
    if record.num_samples < 4:
        return [f"{record.num_samples} draws of each chain are too few for R-hat and ESS"]
    found = []
    if record.num_chains < 2:
        found.append("one chain: R-hat compares chains, run at least four from spread starts")
    elif rhat.value >= MAX_RHAT:
        found.append(f"R-hat {rhat} is not below {MAX_RHAT}: chains disagree, run them longer")
    for kind, ess in (("bulk", ess_bulk), ("tail", ess_tail)):
        if ess.value < MIN_ESS:
            found.append(
                f"{kind} ESS {ess} is below {MIN_ESS:.0f}: run longer before quoting digits"
            )
    return found


def _sampler_warnings(
    record: Record, energies: tuple[float, ...], diverged: int | None, saturated: int | None
) -> list[str]:
    found = []
    if low := [f"{value:.2f} (chain {i})" for i, value in enumerate(energies) if value < MIN_BFMI]:
        found.append(f"BFMI {', '.join(low)} is below {MIN_BFMI}: reparametrize heavy tails")
    total = record.num_chains * record.num_samples
    if diverged:
        found.append(
            f"{diverged} of {total} transitions diverged: raise target_accept_prob or reparametrize"
        )
    if saturated:
        found.append(f"{saturated} of {total} trees hit the maximal depth: raise max_tree_depth")
    if doubts := record.attrs.get("doubts"):
        found.append(str(doubts))
    return found


def _notes(record: Record, partly: list[str]) -> list[str]:
    notes = [f"some coordinates of {name} are constant and were left out" for name in partly]
    if not record.adjusted:
        bias = record.attrs.get("bias", "its draws are not those of the target")
        notes.append(f"{record.sampler} is not adjusted: {bias}")
    if record.approximate:
        notes.append("the draws are approximate: their chains were known to be short")
    if record.inverse_temperature not in (None, 1, 1.0):
        notes.append(f"tempered at inverse temperature {record.inverse_temperature}: not the model")
    return notes
