r"""Log Z by bridge sampling between draws of the law and draws of a normalized proposal.

With the log ratios :math:`s = -U - \log q`, the optimal bridge of Meng and Wong is the root c of

.. math:: N_p\, E_p\, \sigma(c - s + \log\nu) = N_q\, E_q\, \sigma(s - c - \log\nu), \qquad
    \nu = N_q / N_p,

the same equation as Bennett's acceptance ratio. It needs overlap of the two only, not a proposal
with heavier tails; draws from chains count by their effective sample size. The proposal is a
Gaussian in unconstrained coordinates fitted to one half of the draws, the other half is bridged:
fitted to the same draws the estimate would be biased. Of discrete laws the proposal is a product of
sites (:mod:`~pyro_ebm.normalizers.discrete_bridge`). Draws of another law betray themselves: for
them bridges that are not optimal find another log Z.

References:
    Meng, Wong, Simulating ratios of normalizing constants via a simple identity, Statistica Sinica
    6, 1996; Bennett, Efficient estimation of free energy differences from Monte Carlo data, Journal
    of Computational Physics 22, 1976; Frühwirth-Schnatter, Estimating marginal likelihoods for
    mixture and Markov switching models using bridge sampling techniques, Econometrics Journal 7,
    2004 (the error).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.normalizers.chain_size import carried_share, size_of_mean
from pyro_ebm.normalizers.discrete_bridge import log_ratios
from pyro_ebm.normalizers.discrete_path import is_discrete
from pyro_ebm.normalizers.laws import check_inside, on_reals, parameters_at, single
from pyro_ebm.ops.constraints import plain
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.log_space import bennett
from pyro_ebm.ops.nan_energies import NaNCount
from pyro_ebm.ops.spaces import UnconstrainedSpace

_ASIDE = 2.0  # nats: far enough to see another ratio of densities, near enough for light weights
_FAR = 5.0  # standard errors
_MIN_ERROR = 1e-4  # nats: below are roundings of energies


def bridge(dist: EnergyDistribution, draws: Tensor) -> LogNormalizer:
    """Estimates log Z from draws of the law.

    Args:
        dist: A distribution with ``batch_shape == ()``, continuous or discrete; on infinitely many
            discrete states it needs a base. Of a generalized EBM the latents are meant.
        draws: Draws of it, ``(chains, draws) + event_shape``, by ``MCMC.get_samples()["x"]`` or
            ``["x_latent"]``.

    Returns:
        ``LogNormalizer`` in nats; ``ess`` is the smaller effective size of the two bridged
        averages.

    Raises:
        NotImplementedError: If the support is neither continuous nor discrete, or has infinitely
            many discrete states and no base.
        ValueError: If there are fewer draws than four times the coordinates, their shape is not
            that, some are NaN or outside of the support, or they do not spread.
        NonFiniteEnergyError: If the energy is not finite at a draw.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
        >>> print(bridge(law, torch.randn(20, 100)))  # doctest: +ELLIPSIS
        log Z = 0.91... ± 0.00... nats (bridge, from the draws, ESS ... of 1000)
    """
    law = single(dist, "bridge sampling")
    if is_discrete(law):
        return _of_states(law, draws)
    on_reals(law, "bridge sampling")
    target = DistributionTarget(law)
    u = _positions(target, law, draws)
    half = u.shape[1] // 2
    fitted = _gaussian(u[:, :half].flatten(0, 1))
    kept = u[:, half:]
    noise = fitted.sample(torch.Size((kept.shape[0] * kept.shape[1],)))
    seen = NaNCount()
    at_draws, at_noise = (
        -seen(_potential(target, points, draws.dtype)) - fitted.log_prob(points)
        for points in (kept.flatten(0, 1), noise)
    )
    at_draws = at_draws.reshape(kept.shape[:2])
    if not bool(torch.isfinite(at_draws).all()):
        raise NonFiniteEnergyError(f"{law!r}: the energy is not finite at a draw of the law")
    x = draws.flatten(0, 1)[:1]
    return bridged(at_draws, at_noise, "bridge", start="draws", law=law, at=x, seen=seen)


def _of_states(law: EnergyDistribution, draws: Tensor) -> LogNormalizer:
    seen = NaNCount()
    at_draws, at_noise = log_ratios(law, draws, seen)
    x = draws.flatten(0, 1)[:1]
    return bridged(at_draws, at_noise, "bridge", start="draws", law=law, at=x, seen=seen)


def bridged(
    at_draws: Tensor,
    at_noise: Tensor,
    method: str,
    *,
    start: str,
    law: EnergyDistribution,
    at: Tensor | None = None,
    seen: NaNCount | None = None,
) -> LogNormalizer:
    r"""Returns the optimal bridge between two sets of log ratios.

    Args:
        at_draws: :math:`-U - \log q` at draws of the law, ``(chains, draws)``.
        at_noise: The same at independent draws of q, ``(N,)``; minus infinity where p vanishes.
        method: Name of the estimator.
        start: Where the draws of the law come from.
        law: The law.
        at: Values of it in the dtype that the energy takes; a draw of the base if not given.
        seen: Energies that were NaN.
    """
    size = size_of_mean(at_draws)
    log_ratio = torch.tensor(len(at_noise) / size, dtype=torch.float64).log()
    data, noise = (t.double() - log_ratio for t in (at_draws, at_noise))
    value = bennett(data.flatten(), noise, ratio=float(log_ratio.exp()))
    of_draws, of_noise = torch.sigmoid(value - data), torch.sigmoid(noise - value)
    sizes = size_of_mean(of_draws), float(len(at_noise))
    errors = [_relative_variance(of_draws) / sizes[0], _relative_variance(of_noise) / sizes[1]]
    remarks = (seen.remarks if seen else ()) + _remarks(data, noise, value)
    shares = [carried_share(of_draws) * sizes[0], carried_share(of_noise) * sizes[1]]
    return LogNormalizer(
        value,
        torch.stack(errors).sum().sqrt(),
        method,
        ess=min(shares),
        num_samples=at_draws.numel(),
        start=start,
        remarks=remarks,
        parameters=parameters_at(law, at),
    )


def _remarks(data: Tensor, noise: Tensor, value: Tensor) -> tuple[str, ...]:
    r"""Whether bridges to both sides of the optimal one find another log Z.

    For draws of the law :math:`e^{c} E_p\,\sigma(m - s) = e^{m} E_q\,\sigma(s - m)` at every m,
    since :math:`s - c` is the log ratio of the two densities; for other draws c depends on m.
    """
    logs, parts = [], []
    for m in (value - _ASIDE, value + _ASIDE):
        of_draws, of_noise = torch.sigmoid(m - data), torch.sigmoid(noise - m)
        logs.append(m + of_noise.mean().log() - of_draws.mean().log())
        parts.append((of_draws / of_draws.mean(), of_noise / of_noise.mean()))
    (low, low_noise), (high, high_noise) = parts
    gap, of_draws, of_noise = float(logs[1] - logs[0]), high - low, high_noise - low_noise
    error = float(of_draws.var() / size_of_mean(of_draws) + of_noise.var() / len(of_noise)) ** 0.5
    if not abs(gap) > _FAR * max(error, _MIN_ERROR):
        return ()
    return (
        f"bridges to both sides of this one differ by {abs(gap):.3f}, {abs(gap) / error:.0f} of "
        "their errors: the draws are not draws of this law; draw longer, or from elsewhere",
    )


def _relative_variance(terms: Tensor) -> Tensor:
    return terms.var() / terms.mean().square()


def _positions(target: DistributionTarget, law: EnergyDistribution, draws: Tensor) -> Tensor:
    if draws.shape[2:] != law.event_shape or draws.dim() < 2:
        raise ValueError(
            f"draws must be (chains, draws) + {tuple(law.event_shape)}, got {tuple(draws.shape)}"
        )
    u = target.position_of(check_inside(law, draws)).double()
    if u.shape[0] * u.shape[1] < least_draws(law):
        raise ValueError(
            f"{u.shape[0] * u.shape[1]} draws are too few for a Gaussian in {target.dim} "
            "dimensions fitted to half of them"
        )
    if not bool(u.isfinite().all()):
        raise ValueError(
            "some draws have no finite unconstrained coordinates: they lie outside of the law's "
            f"support ({plain(law.support)}) or at its edge, leave them out"
        )
    return u


def least_draws(law: EnergyDistribution) -> int:
    """Returns how many draws a bridge takes at least: half of them make the Gaussian."""
    return 4 * UnconstrainedSpace.of(law.support, law.event_shape).size + 4


def _gaussian(u: Tensor) -> MultivariateNormal:
    covariance = torch.cov(u.T).reshape(u.shape[1], u.shape[1])
    scale_tril, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        raise ValueError(
            f"the draws do not spread in all {u.shape[1]} dimensions (they are constant, or lie in "
            "a plane), so that no Gaussian fits them: take more draws, of chains that move"
        )
    return MultivariateNormal(u.mean(0), scale_tril=scale_tril)


def _potential(target: DistributionTarget, u: Tensor, dtype: torch.dtype) -> Tensor:
    """Evaluates the energy in the dtype of the law's draws: its parameters may have no other."""
    with torch.no_grad():
        return target.potential(u.to(dtype)).double()
