r"""Log Z from energies along a ladder: thermodynamic integration and stepping stones.

With :math:`p_\beta \propto \mathrm{base}\, e^{-\beta E}` the slope of :math:`\log Z_\beta` is
:math:`-\mathbb E_\beta E` and its curvature :math:`\operatorname{Var}_\beta E`, so that

.. math:: \log Z = -\int_0^1 \mathbb E_\beta E \, d\beta \approx -\sum_k \Big[
    \tfrac{h_k}{2} \big(\mathbb E_k E + \mathbb E_{k+1} E\big)
    + \tfrac{h_k^2}{12} \big(\operatorname{Var}_{k+1} E - \operatorname{Var}_k E\big)\Big],

the trapezoidal rule corrected by the slopes at its ends, whose error falls as the fourth power of
the steps :math:`h_k`. Stepping stones have no such error: each step is importance sampling,

.. math:: \log Z = \sum_k \log \mathbb E_k\, e^{-h_k E}.

Standard errors compare whole chains, each with what it contributes at all rungs: autocorrelation,
and what chains take along from rung to rung, are in them. To the integral's the error of the rule
is added, a fifteenth of the change when every second rung is left out.

References:
    Gelman, Meng, Simulating normalizing constants, Statistical Science 13, 1998; Friel, Hurn, Wyse,
    Improving power posterior estimation of statistical evidence, Statistics and Computing 24, 2014
    (the correction); Xie, Lewis, Fan, Kuo, Chen, Improving marginal likelihood estimation for
    Bayesian phylogenetic model selection, Systematic Biology 60, 2011 (stepping stones).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.normalizers.chain_size import carried_share, size_of_mean
from pyro_ebm.normalizers.discrete_path import DiscretePath, is_discrete
from pyro_ebm.normalizers.laws import based, parameters_at, single
from pyro_ebm.normalizers.tempered import TemperedRun, tempered
from pyro_ebm.ops.log_normalizer import LogNormalizer

_ORDER = 15.0  # 2^4 - 1: what halving the steps takes off an error of fourth order


def thermodynamic(dist: EnergyDistribution, run: TemperedRun | None = None) -> LogNormalizer:
    """Estimates log Z by integrating mean energies from the base to the law.

    Args:
        dist: A distribution with a base and ``batch_shape == ()``; one on finitely many states
            needs none.
        run: Energies along a ladder, by :func:`~pyro_ebm.normalizers.tempered.tempered`; such a run
            with its defaults if not given.

    Returns:
        ``LogNormalizer`` in nats. Its error has that of the chains and that of the rule, and where
        the latter is larger a remark says so; ``ess`` is that of the mean energy at the worst rung.

    Raises:
        ValueError: If the distribution has nothing to start from, or is a batch.
        NonFiniteEnergyError: If the base has draws of infinite energy.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
        >>> print(thermodynamic(law))  # doctest: +ELLIPSIS
        log Z = -0.34... ± 0.00... nats (thermodynamic, from the base, ESS ... of 12800)
    """
    law, start, log_mass = started(dist, "thermodynamic integration")
    run = tempered(law) if run is None else run
    energies = run.energies.double()
    if not bool(torch.isfinite(energies).all()):
        raise NonFiniteEnergyError(
            f"{law!r}: the energy is infinite or NaN at draws of the {start}, so that its mean "
            "does not exist: use stepping_stones"
        )
    by_chain = integral(run.ladder, energies)
    error = _error_of_mean(by_chain)
    halved = integral(*_every_second(run.ladder, energies))
    of_rule = (by_chain.mean() - halved.mean()).abs() / _ORDER
    remark = f"the rule's own error, {float(of_rule):.2g}, is the larger one: use more rungs"
    return LogNormalizer(
        by_chain.mean() + log_mass,
        torch.hypot(error, of_rule),
        "thermodynamic",
        ess=min(size_of_mean(rung) for rung in energies),
        num_samples=energies[0].numel(),
        start=start,
        remarks=(*run.remarks, *((remark,) if bool(of_rule > error) else ())),
        parameters=parameters_at(law),
    )


def stepping_stones(dist: EnergyDistribution, run: TemperedRun | None = None) -> LogNormalizer:
    """Estimates log Z by importance sampling from each rung of a ladder to the next.

    Args:
        dist: A distribution with a base and ``batch_shape == ()``; one on finitely many states
            needs none.
        run: Energies along a ladder, as for :func:`thermodynamic`.

    Returns:
        ``LogNormalizer`` in nats; ``ess`` is that of the worst step.

    Raises:
        ValueError: If the distribution has nothing to start from, or is a batch.
        NonFiniteEnergyError: If no draw of a rung has a finite energy.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
        >>> print(stepping_stones(law))  # doctest: +ELLIPSIS
        log Z = -0.34... ± 0.00... nats (stepping stones, from the base, ESS ... of 12800)
    """
    law, start, log_mass = started(dist, "stepping stones")
    run = tempered(law) if run is None else run
    log_weights = -run.ladder.diff()[:, None, None] * run.energies[:-1].double()
    tops = log_weights.amax((1, 2), keepdim=True)
    if not bool(torch.isfinite(tops).all()):
        raise NonFiniteEnergyError(f"{law!r}: at some rung no draw has a finite energy")
    weights = (log_weights - tops).exp()
    means = weights.mean((1, 2))
    by_chain = (weights.mean(2) / means[:, None]).sum(0)  # the delta method, chain by chain
    return LogNormalizer(
        (means.log() + tops[:, 0, 0]).sum() + log_mass,
        _error_of_mean(by_chain),
        "stepping stones",
        ess=min(size_of_mean(w) * carried_share(w) for w in weights),
        num_samples=weights[0].numel(),
        start=start,
        remarks=run.remarks,
        parameters=parameters_at(law),
    )


def started(dist: EnergyDistribution, estimator: str) -> tuple[EnergyDistribution, str, float]:
    """Returns the law, what its path starts from, and log of that start's mass in nats.

    Raises:
        ValueError: If it has nothing to start from, or a batch shape.
    """
    law = single(dist, estimator)
    if not is_discrete(law):
        return based(dist, estimator), "base", 0.0
    path = DiscretePath(law)
    return law, path.start, path.log_mass


def integral(ladder: Tensor, energies: Tensor) -> Tensor:
    """Returns what each chain contributes to the corrected rule, ``(chains,)``; their mean is it.

    Args:
        ladder: Inverse temperatures, ``(K + 1,)``.
        energies: Energies in nats, ``(K + 1, chains, draws)``.
    """
    centres = energies.mean((1, 2), keepdim=True)
    num = energies[0].numel()
    variances = (energies - centres).square().mean(2) * num / (num - 1)
    means, steps = energies.mean(2), ladder.diff()[:, None]
    trapezoids = 0.5 * steps * (means[1:] + means[:-1])
    corrections = steps.square() / 12.0 * variances.diff(dim=0)
    return -(trapezoids + corrections).sum(0)


def _every_second(ladder: Tensor, energies: Tensor) -> tuple[Tensor, Tensor]:
    """The ladder with every second rung left out, its ends kept."""
    kept = sorted({*range(0, len(ladder), 2), len(ladder) - 1})
    return ladder[kept], energies[kept]


def _error_of_mean(by_chain: Tensor) -> Tensor:
    return by_chain.std() / len(by_chain) ** 0.5
