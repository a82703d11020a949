r"""A posterior through an estimated log Z: anchors, Hamiltonian Monte Carlo, and what they are off.

The EBM site of a model is an exponential family. Draws of it at a few parameters near the
posterior make log Z a smooth function of the natural parameters
(:mod:`pyro_ebm.normalizers.anchoring`), the site is scored by

.. math:: \log p_\theta(x) \approx \eta(\theta) \cdot T(x) - \log \hat Z(\eta(\theta)),

and HMC follows its gradient. The Monte Carlo error of :math:`\log \hat Z` displaces the posterior
by about :math:`\sqrt{pn / S}` of its standard deviations, which is kept under the rule, and is
reported for every mean (``mcse_logz``). All groups of a plate share one function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ebm.chains import Record
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.infer.bayes.data_structure import check_model
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.exchange.exchange_kernel import check_drawable
from pyro_ebm.mcmc.exchange.exchange_target import ExchangeTarget, exchange_target
from pyro_ebm.normalizers.anchor_error import AnchorError, mcse_logz
from pyro_ebm.normalizers.anchored import Anchored
from pyro_ebm.normalizers.anchoring import anchored_to
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.poutine.surrogate import SiteScorer, surrogate

LogNormalizerOf = Callable[[Tensor], Tensor]


class WithLogNormalizer(SiteScorer):
    """Scores EBM sites by a function for log Z; for ``surrogate``, as a frozen objective.

    Args:
        log_z: From natural parameters ``(..., p)`` to log Z in nats, ``(...)``.
    """

    is_normalized = True

    def __init__(self, log_z: LogNormalizerOf) -> None:
        self.log_z = log_z

    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **context: Any) -> Tensor:
        """Returns the log density in nats, ``sample + batch``."""
        if p.is_normalized:
            return p.log_prob(x)
        energy = p.energy_function
        assert isinstance(energy, ExponentialFamily)
        return p.unnormalized_log_prob(x) - self.log_z(energy.natural())


def anchored_posterior(
    model: Callable[..., Any],
    *args: Any,
    first: Tensor | None = None,
    max_draws: int = 200_000,
    num_samples: int = 500,
    warmup_steps: int = 500,
    num_chains: int = 64,
    disable_progbar: bool = True,
    **kwargs: Any,
) -> Posterior:
    r"""Samples parameters through log Z by draws of the model at anchors.

    Args:
        model: A Pyro model with one observed EBM site whose log Z is missing, an exponential family
            of few parameters.
        *args: Its arguments, with the full data.
        first: Natural parameters ``(p,)`` to look for the posterior from; those at the centre of
            the unconstrained space if not given.
        max_draws: Draws of the family at most, over all anchors.
        num_samples: Draws of a chain.
        warmup_steps: Iterations of a chain before them.
        num_chains: Chains, all in one batch.
        disable_progbar: Hides the progress bar.
        **kwargs: Keyword arguments of the model.

    Returns:
        A :class:`Posterior`, whose summary has a column ``mcse_logz``; printed, it tells the
        largest of them in posterior sds.

    Raises:
        TypeError: If the model is none.
        ValueError: If there is not exactly one such site.
        RuntimeError: If the anchors do not find the posterior, would need more draws, or the
            posterior reaches a degenerate phase.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm.energies import Ising
        >>> def model(image):
        ...     coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 0.6))
        ...     law = EnergyDistribution(Ising(coupling, (12, 12), field=0.1))
        ...     pyro.sample("image", law, obs=image)
        >>> image = Ising(0.3, (12, 12)).sample()
        >>> found = anchored_posterior(model, image)  # doctest: +SKIP
        >>> found.summary()  # doctest: +SKIP
    """
    check_model(model, "an anchored posterior")
    target = exchange_target(model, args, kwargs)
    family, name = _family_of(target)
    laws = _Laws.of(target, name)
    start = target.observed[name].reshape((-1, *family.event_shape))[0]

    def with_log_z(log_z: LogNormalizerOf) -> None:
        surrogate(model, WithLogNormalizer(log_z))(*args, **kwargs)

    def natural(draws: dict[str, Tensor]) -> Tensor:
        return laws.of_rows(target.naturals(target.position_of(draws))[name])

    if first is None:
        centre = target.naturals(torch.zeros(1, target.dim, dtype=target.dtype))[name]
        first = centre.reshape(-1, centre.shape[-1]).mean(0)
    log_z = anchored_to(
        with_log_z,
        family=family,
        natural=natural,
        first=first,
        num_observations=int(laws.counts.max()),
        start=None if family.is_sampleable else start,
        max_draws=max_draws,
    )
    scored = WithLogNormalizer(log_z)
    mcmc = MCMC(
        HMC(surrogate(model, scored)),
        num_samples,
        warmup_steps,
        num_chains=num_chains,
        disable_progbar=disable_progbar,
    )
    mcmc.run(*args, **kwargs)
    error = mcse_logz(mcmc.record, log_z, natural, laws.counts)
    record = error.attached_to(mcmc.record)
    remarks = (_displacement(record, error), *error.doubts)
    return Posterior(record, "anchored log Z", _reasons(log_z), remarks, scored_by=scored)


def _displacement(record: Record, error: AnchorError) -> str:
    """A sentence on the mean that the error of log Z displaces most, in posterior sds."""
    shifts = {
        name: float(np.max(by["mean"] / record.draws[name].std((0, 1))))
        for name, by in error.mcse.items()
    }
    worst = max(shifts, key=lambda name: shifts[name])
    return (
        f"the error of log Z displaces means by {shifts[worst]:.2f} posterior sds at most, that of "
        f"{worst!r}: column mcse_logz of the summary."
    )


def _family_of(target: ExchangeTarget) -> tuple[ExponentialFamily, str]:
    families = target.families()
    if families is None or len(families) != 1:
        raise ValueError(
            f"anchors need one observed EBM site that is an exponential family without a base, got "
            f"{sorted(target.energies)}: use Exchange for several, or give log_normalizer="
        )
    check_drawable(target, exactly=target.draws_are_exact, by_sweeps=not target.draws_are_exact)
    ((name, family),) = families.items()
    return family, name


class _Laws(NamedTuple):
    """The different laws among the rows of a site.

    Args:
        places: A row of each, ``(G,)``.
        counts: How often the Z of each enters the likelihood, ``(G,)``.
    """

    places: Tensor
    counts: Tensor

    @classmethod
    def of(cls, target: ExchangeTarget, name: str) -> _Laws:
        """Looks at one position: rows whose natural parameters agree there share a law."""
        with rng_preserved():
            natural = target.naturals(target.draw_start(1))[name]
        rows = natural.reshape(-1, natural.shape[-1])
        _, which = rows.unique(dim=0, return_inverse=True)
        number = int(which.max()) + 1
        weights = target.weights[name].reshape(-1)
        places = torch.stack([(which == g).nonzero()[0, 0] for g in range(number)])
        return cls(places, weights.new_zeros(number).index_add_(0, which, weights))

    def of_rows(self, natural: Tensor) -> Tensor:
        """Returns the natural parameters of the laws, ``(S, G, p)``, for ``(S,) + B + (p,)``."""
        return natural.reshape(len(natural), -1, natural.shape[-1])[:, self.places]


def _reasons(log_z: Anchored) -> tuple[str, ...]:
    number = log_z.statistics[..., 0].numel()
    return (
        f"log Z is a smooth function by {number} draws of the model at {len(log_z.anchors)} "
        "parameters near the posterior.",
    )
