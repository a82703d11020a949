r"""Log Z by bridge sampling between draws of the law and draws of a normalized proposal.

With the log ratios :math:`s = -U - \log q`, the optimal bridge of Meng and Wong is the root c of

.. math:: N_p\, E_p\, \sigma(c - s + \log\nu) = N_q\, E_q\, \sigma(s - c - \log\nu), \qquad
    \nu = N_q / N_p,

the same equation as Bennett's acceptance ratio. It needs overlap of the two only, not a proposal
with heavier tails; draws from chains count by their effective sample size. The proposal is a
Gaussian in unconstrained coordinates fitted to one half of the draws, the other half is bridged:
fitted to the same draws the estimate would be biased.

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
from pyro_ebm.mcmc.distribution_target import DistributionTarget
from pyro_ebm.normalizers.chain_size import carried_share, size_of_mean
from pyro_ebm.normalizers.laws import leaves_of, single
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.log_space import bennett


def bridge(dist: EnergyDistribution, draws: Tensor) -> LogNormalizer:
    """Estimates log Z from draws of the law.

    Args:
        dist: A distribution on a continuous support with ``batch_shape == ()``; of a generalized
            EBM the latents are meant.
        draws: Draws of it, ``(chains, draws) + event_shape``, by ``MCMC.get_samples()["x"]`` or
            ``["x_latent"]``.

    Returns:
        ``LogNormalizer`` in nats; ``ess`` is the smaller effective size of the two bridged
        averages.

    Raises:
        ValueError: If there are fewer draws than twice the coordinates, or the shape is not that.
        NonFiniteEnergyError: If the energy is not finite at a draw.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
        >>> print(bridge(law, torch.randn(20, 100)))  # doctest: +ELLIPSIS
        log Z = 0.91... ± 0.00... nats (bridge, from the draws, ESS ... of 1000)
    """
    law = single(dist, "bridge sampling")
    target = DistributionTarget(law)
    u = _positions(target, law, draws)
    half = u.shape[1] // 2
    fitted = _gaussian(u[:, :half].flatten(0, 1))
    kept = u[:, half:]
    noise = fitted.sample(torch.Size((kept.shape[0] * kept.shape[1],)))
    at_draws, at_noise = (
        _log_ratio(target, fitted, points, draws.dtype) for points in (kept.flatten(0, 1), noise)
    )
    at_draws = at_draws.reshape(kept.shape[:2])
    if not bool(torch.isfinite(at_draws).all()):
        raise NonFiniteEnergyError(f"{law!r}: the energy is not finite at a draw of the law")
    return bridged(at_draws, at_noise, "bridge", start="draws", law=law)


def bridged(
    at_draws: Tensor, at_noise: Tensor, method: str, *, start: str, law: EnergyDistribution
) -> LogNormalizer:
    r"""Returns the optimal bridge between two sets of log ratios.

    Args:
        at_draws: :math:`-U - \log q` at draws of the law, ``(chains, draws)``.
        at_noise: The same at independent draws of q, ``(N,)``; minus infinity where p vanishes.
        method: Name of the estimator.
        start: Where the draws of the law come from.
        law: The law.
    """
    size = size_of_mean(at_draws)
    log_ratio = torch.tensor(len(at_noise) / size, dtype=torch.float64).log()
    data, noise = (t.double() - log_ratio for t in (at_draws, at_noise))
    noise = torch.where(noise.isnan(), -torch.inf, noise)  # off the law's support
    value = bennett(data.flatten(), noise, ratio=float(log_ratio.exp()))
    of_draws, of_noise = torch.sigmoid(value - data), torch.sigmoid(noise - value)
    sizes = size_of_mean(of_draws), float(len(at_noise))
    errors = [_relative_variance(of_draws) / sizes[0], _relative_variance(of_noise) / sizes[1]]
    shares = [carried_share(of_draws) * sizes[0], carried_share(of_noise) * sizes[1]]
    return LogNormalizer(
        value,
        torch.stack(errors).sum().sqrt(),
        method,
        ess=min(shares),
        num_samples=at_draws.numel(),
        start=start,
        parameters=leaves_of(law),
    )


def _relative_variance(terms: Tensor) -> Tensor:
    return terms.var() / terms.mean().square()


def _positions(target: DistributionTarget, law: EnergyDistribution, draws: Tensor) -> Tensor:
    if draws.shape[2:] != law.event_shape or draws.dim() < 2:
        raise ValueError(
            f"draws must be (chains, draws) + {tuple(law.event_shape)}, got {tuple(draws.shape)}"
        )
    u = target.position_of(draws).double()
    if u.shape[0] * u.shape[1] < 4 * target.dim + 4:
        raise ValueError(
            f"{u.shape[0] * u.shape[1]} draws are too few for a Gaussian in {target.dim} "
            "dimensions fitted to half of them"
        )
    return u


def _gaussian(u: Tensor) -> MultivariateNormal:
    covariance = torch.cov(u.T).reshape(u.shape[1], u.shape[1])
    return MultivariateNormal(u.mean(0), covariance)


def _log_ratio(
    target: DistributionTarget, q: MultivariateNormal, u: Tensor, dtype: torch.dtype
) -> Tensor:
    """Evaluates the energy in the dtype of the law's draws: its parameters may have no other."""
    with torch.no_grad():
        value = -target.potential(u.to(dtype)).double()
    return torch.where(value.isnan(), -torch.inf, value) - q.log_prob(u)
