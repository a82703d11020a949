r"""Generalized Bayes: a posterior from a loss, where the likelihood has no computable log Z.

.. math:: \pi_w(\theta) \propto \pi(\theta)\, e^{-w L(\theta)}, \qquad L = \sum_i \ell_\theta(x_i)

A loss is not a log likelihood: w = 1 has no meaning, and for several parameters no single w makes
the posterior's width that of the estimator's own uncertainty. :func:`generalized_posterior` chooses
w by that uncertainty (:mod:`pyro_ebm.infer.bayes.loss_weight`), which settles the balance of loss
and prior, draws, and then calibrates the width (:mod:`pyro_ebm.infer.bayes.calibration`).

References:
    Bissiri, Holmes, Walker, A general framework for updating belief distributions, JRSS B 78, 2016.
    arXiv:1306.6430.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypedDict

from torch import Tensor

from pyro_ebm.chains import Record
from pyro_ebm.chains.record import to_numpy
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.bayes.calibration import Calibration, calibration_of
from pyro_ebm.infer.bayes.data_structure import check_model, observed_ebms
from pyro_ebm.infer.bayes.loss_of_model import ModelLoss
from pyro_ebm.infer.bayes.loss_weight import weight_of
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.infer.bayes.prior_runs import prior_runs
from pyro_ebm.infer.bayes.properness import check_proper
from pyro_ebm.infer.bayes.score_covariance import Choice
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.targets.model_target import ModelTarget, target_of_model
from pyro_ebm.ops.arguments import one_of, positive
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.poutine.surrogate import SurrogateObjective, surrogate


class GeneralizedBayes:
    """A frozen objective whose loss counts ``weight`` times, for ``surrogate(model, this)``.

    Args:
        objective: A deterministic objective, or one that was frozen.
        weight: w, positive.

    Raises:
        TypeError: If the objective draws anew at every evaluation.
        ValueError: If the weight is not positive.

    Example:
        >>> import torch
        >>> from pyro_ebm.infer.score.score_matching import ScoreMatching
        >>> half = GeneralizedBayes(ScoreMatching(), weight=0.5)
        >>> p = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
        >>> half.site_log_prob("x", p, torch.tensor(2.0))  # minus half of 4/2 - 1
        tensor(-0.5000)
    """

    is_frozen = True
    is_likelihood = False
    is_normalized = False

    def __init__(self, objective: SurrogateObjective, weight: float | Tensor = 1.0) -> None:
        if not getattr(objective, "is_frozen", False):
            raise TypeError(
                f"GeneralizedBayes needs one fixed loss, and {type(objective).__name__} draws anew "
                "at every evaluation: freeze it first, objective.freeze(model, *args)"
            )
        self.objective = objective
        self.weight = weight if isinstance(weight, Tensor) else positive("weight", weight)

    def free_log_normalizers(self) -> Mapping[str, Any]:
        """Returns the priors of the objective's log Z's."""
        return self.objective.free_log_normalizers()

    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **options: Any) -> Tensor:
        """Returns minus ``weight`` times the loss per datum."""
        return self.weight * self.objective.site_log_prob(name, p, x, **options)


def generalized_posterior(
    model: Callable[..., Any],
    *args: Any,
    loss: Any,
    weight: float = 1.0,
    calibration: Choice = "auto",
    num_samples: int = 500,
    warmup_steps: int | None = None,
    num_chains: int = 16,
    num_simulations: int = 1000,
    num_sweeps: int = 20,
    disable_progbar: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Draws a generalized posterior by HMC and gives it the width of the loss's own uncertainty.

    Args:
        model: A Pyro model with observed EBM sites, log Z not needed.
        *args: Its arguments, with the full data.
        loss: An objective, such as ``PseudoLikelihood()``; one with noise is frozen first.
        weight: w of the loss, if nothing is calibrated. A calibration chooses w itself, so that
            neither this nor the unit of the data matters. Where the loss alone has no minimizer
            they do, and the result says ``"unweighted"``.
        calibration: ``"sandwich"`` from the gradients of independent rows, ``"simulation"`` from
            simulated data sets, ``"none"``, or ``"auto"``: by the structure of the data.
        num_samples: Draws of a chain.
        warmup_steps: Of a chain; ``num_samples`` if not given.
        num_chains: Chains, all in one batch.
        num_simulations: Data sets that ``"simulation"`` draws, at the minimizer of the loss alone
            and again at the posterior mode. Where the energy has neither an exact sampler nor
            sweeps of its own, as a function of a lattice has not, this takes minutes, without a
            progress bar: give an energy such as ``Ising``, or fewer.
        num_sweeps: Sweeps from the data to each of them, where the energy has no exact sampler.
        disable_progbar: Hides the progress bar.
        **kwargs: Keyword arguments of the model.

    Returns:
        A :class:`Posterior`; ``record.attrs["weight"]`` is the w that was drawn with. A factor of
        ``poutine.scale`` multiplies the loss, as ``weight`` does; what is calibrated counts the
        rows that there are, and a note says so.

    Raises:
        TypeError: If the model is none.
        ValueError: If the model observes no EBM, an energy is improper, the rows are too few for a
            sandwich, or no mode is found.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_ebm.infer.score.score_matching import ScoreMatching
        >>> def model(x):
        ...     a = pyro.sample("a", dist.Gamma(torch.tensor(2.0), 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         law = EnergyDistribution(lambda x: 0.5 * a * x**2, event_shape=())
        ...         pyro.sample("x", law, obs=x)
        >>> posterior = generalized_posterior(
        ...     model, torch.randn(100), loss=ScoreMatching(), num_samples=50, num_chains=4)
        >>> posterior.calibration, posterior.record.draws["a"].shape
        ('sandwich', (4, 50))
    """
    check_model(model, "a generalized posterior")
    one_of("calibration", calibration, ("auto", "sandwich", "simulation", "none"))
    observed_ebms(prior_runs(model, args, kwargs, num_draws=1)[0])
    doubts = check_proper(model, args, kwargs)
    frozen = loss if loss.is_frozen else loss.freeze(model, *args, **kwargs)
    how: _How = {
        "choice": calibration,
        "num_simulations": num_simulations,
        "num_sweeps": num_sweeps,
    }
    balance = weight_of(_scored(model, frozen, weight, args, kwargs)[1], **how)
    weight = weight * balance.factor
    kernel, losses = _scored(model, frozen, weight, args, kwargs)
    calibrated = calibration_of(losses, **how)
    mcmc = MCMC(
        kernel,
        num_samples,
        warmup_steps,
        num_chains=num_chains,
        disable_progbar=disable_progbar,
    )
    starts = calibrated.starts(num_chains)
    values = None if starts is None else losses.target.split(starts)
    mcmc.run(*args, initial_params=values, **kwargs)
    is_weighted = balance.is_own or calibrated.kind == "none"
    kind = calibrated.kind if is_weighted else "unweighted"
    attrs = {"loss": type(loss).__name__, "weight": weight, "calibration": kind}
    found = _result(mcmc, losses.target, calibrated, attrs)
    counts = f"The loss counts {weight:.3g} times, {balance.why}."
    return replace(
        found,
        reasons=(*found.reasons, counts),
        remarks=balance.remarks + found.remarks + doubts,
    )


class _How(TypedDict):
    choice: Choice
    num_simulations: int
    num_sweeps: int


def _scored(
    model: Callable[..., Any],
    frozen: SurrogateObjective,
    weight: float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[HMC, ModelLoss]:
    """The kernel over a model with a weighted loss, and that loss."""
    scored = GeneralizedBayes(frozen, weight)
    kernel = HMC(surrogate(model, scored))
    with rng_preserved():
        target = target_of_model(kernel.given, args, kwargs)
        return kernel, ModelLoss(target, model, scored, (args, kwargs))


def _result(
    mcmc: MCMC, target: ModelTarget, calibrated: Calibration, attrs: Mapping[str, Any]
) -> Posterior:
    old = mcmc.record
    q = target.join(mcmc.get_samples(unconstrained=True))
    stats = old.sample_stats
    if calibrated.kind != "none":  # it is that of the draws before they were moved
        stats = {k: v for k, v in stats.items() if k != "lp"}
    record = Record(
        {site: to_numpy(value) for site, value in target.constrain(calibrated(q)).items()},
        sample_stats=stats,
        sampler=old.sampler,
        seconds=old.seconds,
        attrs=dict(attrs),
    )
    return Posterior(
        record,
        f"generalized Bayes by {attrs['loss']}",
        reasons=calibrated.reasons,
        remarks=calibrated.remarks,
        calibration=attrs["calibration"],
    )
