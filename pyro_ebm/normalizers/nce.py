r"""Log Z by telling data from noise, with the error that fitted parameters leave in it.

With N data :math:`x`, :math:`\nu N` draws :math:`y` of a normalized noise density :math:`q` and
:math:`G = -U - c - \log q - \log\nu`, the log Z of noise-contrastive estimation is the root of

.. math:: \sum_i \{1 - \sigma(G(x_i))\} = \sum_j \sigma(G(y_j)),

which is Bennett's equation with data for draws. It is consistent if the data are draws of the law.
With :math:`g` the gradient of :math:`-U - c` in the parameters and c,
:math:`H = \sum \sigma(1 - \sigma) g g^\top` over data and noise, and V the covariance of the sum of
their scores, the covariance of parameters and c is :math:`H^{-1} V H^{-1}`. Where the model is
right, that is

.. math:: \tfrac1n \{I^{-1} - (1 + 1/\nu)\, e_c e_c^\top\}, \qquad
    I = \int g g^\top \frac{\nu q}{p + \nu q}\, p,

so that the inverse information alone overstates the variance of c, and of nothing else. The first
form needs no difference of nearly equal numbers, and is the one computed.

How c errs as log Z *at the parameters that were fitted* is much less than how it errs as log Z at
the true ones: errors of parameters and of c go together. The first is the standard error of
:func:`nce`, the second the corner of :func:`nce_covariance`.

References:
    Gutmann, Hyvärinen, Noise-contrastive estimation of unnormalized statistical models, JMLR 13,
    2012, theorem 3 (their c is minus ours); Bennett, Efficient estimation of free energy
    differences from Monte Carlo data, Journal of Computational Physics 22, 1976.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.normalizers.importance import from_weights
from pyro_ebm.normalizers.laws import check_inside, normalized_on, parameters_at, single, within
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.log_space import bennett
from pyro_ebm.ops.nan_energies import NaNCount

_FAR = 4.0  # standard errors between two estimates of log Z
_SINGULAR = 1e-10


class _Told(NamedTuple):
    r"""Data and noise as a classifier at the root c sees them.

    Args:
        c: Log Z, 0-d.
        data: Probabilities of "data" at the data, ``(N,)``.
        noise: The same at the noise, ``(M,)``.
        log_weights: :math:`-U - \log q` at the noise, ``(M,)``.
        seen: Energies at the noise that were NaN.
    """

    c: Tensor
    data: Tensor
    noise: Tensor
    log_weights: Tensor
    seen: NaNCount


def nce(
    dist: EnergyDistribution,
    data: Tensor,
    noise: Any = None,
    *,
    num_noise: int = 10,
    fitted: Iterable[Tensor] = (),
) -> LogNormalizer:
    """Estimates log Z by telling data from fresh draws of a noise density.

    Args:
        dist: A distribution with ``batch_shape == ()``.
        data: Independent draws of it, ``(N,) + event_shape``; for draws of chains use
            :func:`bridge`, which counts them by their effective number.
        noise: A normalized distribution on the same support that overlaps with it; the base if not
            given.
        num_noise: Noise draws per datum; that of the fit where parameters were fitted.
        fitted: Parameters of the energy that NCE has learned from these same data, with new noise
            at every step. Their error is then part of the standard error, at the price of a
            backward pass for each of their elements.

    Returns:
        ``LogNormalizer`` in nats; ``stderr`` is about log Z at the present parameters, ``ess`` the
        smaller effective number of data and noise.

    Raises:
        ValueError: If there is no noise, shapes differ, or ``fitted`` is not identified.
        NonFiniteEnergyError: If the energy is not finite at a datum.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
        >>> print(nce(law, torch.randn(2000), dist.Normal(0.0, 1.5)))  # doctest: +ELLIPSIS
        log Z = 0.91... ± 0.00... nats (NCE, from the data, ESS ... of 2000)
    """
    law = single(dist, "NCE")
    q = normalized_on(law, noise, "noise")
    size = len(_rows(law, data)) * whole("num_noise", num_noise, least=1)
    points = q.sample(torch.Size((size,)))
    told = _tell(law, q, data, points)
    return LogNormalizer(
        told.c,
        _variance_at_parameters(law, told, data, points, tuple(fitted)).sqrt(),
        "NCE",
        ess=min(_effective(1.0 - told.data), _effective(told.noise)),
        num_samples=len(data),
        start="data",
        remarks=told.seen.remarks + _remarks(law, told, data[:1]),
        parameters=parameters_at(law, data[:1]),
    )


def nce_covariance(
    dist: EnergyDistribution, data: Tensor, points: Tensor, noise: Any, *, fitted: Iterable[Tensor]
) -> Tensor:
    """Returns the covariance of fitted parameters and c, both estimated from these draws.

    Args:
        dist: A distribution with ``batch_shape == ()``, its parameters at their NCE estimates.
        data: ``(N,) + event_shape``.
        points: The draws of the noise that were used, ``(M,) + event_shape``.
        noise: The noise's normalized distribution.
        fitted: The P elements' tensors; the energy must depend on them.

    Returns:
        ``(P + 1, P + 1)`` in float64; the last row is that of c, whose corner is the variance of c
        as an estimate of log Z at the true parameters.

    Raises:
        ValueError: If ``fitted`` is not identified.
    """
    law = single(dist, "NCE")
    told = _tell(law, normalized_on(law, noise, "noise"), _rows(law, data), points)
    parameters = tuple(fitted)
    at_data, at_noise = _both_slopes(law, told, data, points, parameters)
    inverse = _inverse_information(told, at_data, at_noise)
    scores = _scatter((1 - told.data)[:, None] * at_data) + _scatter(told.noise[:, None] * at_noise)
    return inverse @ scores @ inverse


def _variance_at_parameters(
    law: EnergyDistribution, told: _Told, data: Tensor, points: Tensor, fitted: tuple[Tensor, ...]
) -> Tensor:
    """The variance of c minus log Z at the parameters: that of c where slopes are centred."""
    at_data, at_noise = _both_slopes(law, told, data, points, fitted)
    centre = at_data.mean(0)
    centre[-1] = 0.0
    at_data, at_noise = at_data - centre, at_noise - centre
    with_data = _inverse_information(told, at_data, at_noise)[-1]
    of_data = with_data @ _scatter((1 - told.data)[:, None] * at_data) @ with_data
    slope = (told.data * (1 - told.data)).sum() + (told.noise * (1 - told.noise)).sum()
    return of_data + _scatter(told.noise[:, None]).squeeze() / slope.square()


def _tell(law: EnergyDistribution, q: Any, data: Tensor, points: Tensor) -> _Told:
    seen = NaNCount()
    at_data = _log_ratio(law, q, data)
    at_noise = -seen(-within(law, q, points, _log_ratio(law, q, points)))
    if not bool(at_data.isfinite().all()):
        raise NonFiniteEnergyError(f"{law!r}: the energy is not finite at a datum")
    counts = at_noise > -math.inf
    if not bool(counts.any()):
        raise NonFiniteEnergyError(f"{law!r}: none of {len(points)} noise draws has finite energy")
    log_ratio = math.log(len(at_noise) / len(at_data))
    at_data, logits = at_data - log_ratio, at_noise - log_ratio
    c = bennett(at_data, logits[counts], ratio=int(counts.sum()) / len(at_data))
    return _Told(c, torch.sigmoid(at_data - c), torch.sigmoid(logits - c), at_noise, seen)


def _log_ratio(law: EnergyDistribution, q: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (law.unnormalized_log_prob(x) - q.log_prob(x)).double()


def _both_slopes(
    law: EnergyDistribution, told: _Told, data: Tensor, points: Tensor, fitted: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Slopes at data and noise; noise where p vanishes has no weight, and may have no slope."""
    at_data, at_noise = (_slopes(law, x, fitted) for x in (data, points))
    at_noise = torch.where(told.noise[:, None] > 0, at_noise, 0.0)
    if not bool(at_data.isfinite().all() and at_noise.isfinite().all()):
        raise NonFiniteEnergyError(f"{law!r}: the energy's slope in a parameter is not finite")
    return at_data, at_noise


def _slopes(law: EnergyDistribution, x: Tensor, fitted: tuple[Tensor, ...]) -> Tensor:
    """Derivatives of -U - c at every point, ``(N, P + 1)``, minus one for c being the last.

    The gradient of a weighted sum is linear in the weights: its derivative in them has every
    point's own share, one element of the parameters at a time.
    """
    columns = []
    if fitted:
        with torch.enable_grad():
            values = law.unnormalized_log_prob(x)
            weights = torch.ones_like(values, requires_grad=True)
            total = (weights * values).sum()
            if not all(parameter.requires_grad for parameter in fitted):
                raise ValueError("fitted: every tensor must require gradients")
            grads = torch.autograd.grad(total, fitted, create_graph=True, materialize_grads=True)
        for element in torch.cat([grad.flatten() for grad in grads]):
            columns.append(_derivative(element, weights).double())
    last = torch.full((len(x),), -1.0, dtype=torch.float64, device=x.device)
    return torch.stack([*columns, last], 1)


def _derivative(element: Tensor, weights: Tensor) -> Tensor:
    """Zero where the energy does not depend on a parameter at all."""
    if not element.requires_grad:
        return torch.zeros_like(weights)
    return torch.autograd.grad(element, weights, retain_graph=True, materialize_grads=True)[0]


def _inverse_information(told: _Told, at_data: Tensor, at_noise: Tensor) -> Tensor:
    both = torch.cat([at_data, at_noise])
    weights = torch.cat([told.data * (1 - told.data), told.noise * (1 - told.noise)])
    information = both.T @ (weights[:, None] * both)
    scale = information.diagonal().sqrt()
    correlation = information / scale.outer(scale)
    if not bool(correlation.isfinite().all()) or _least_eigenvalue(correlation) < _SINGULAR:
        raise ValueError(
            f"fitted: these {both.shape[1] - 1} elements are not identified by the data (the "
            "energy does not depend on one, or only on combinations of them), so they have no "
            "standard errors: leave them out"
        )
    return torch.linalg.inv(correlation) / scale.outer(scale)


def _least_eigenvalue(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[0])


def _scatter(scores: Tensor) -> Tensor:
    """The covariance of a sum of independent rows."""
    centred = scores - scores.mean(0)
    return centred.T @ centred * (len(scores) / (len(scores) - 1))


def _effective(terms: Tensor) -> float:
    """How many of the terms carry their sum."""
    return float(terms.sum().square() / terms.square().sum())


def _remarks(law: EnergyDistribution, told: _Told, x: Tensor) -> tuple[str, ...]:
    """Whether importance sampling from the same noise, which needs no data, says otherwise."""
    other = from_weights(told.log_weights, "importance", start="noise", law=law, at=x)
    gap, error = float((told.c - other.value).abs()), float(other.stderr)  # type: ignore[arg-type]
    if not other.is_trusted or gap <= _FAR * max(error, 1e-8):
        return ()
    return (
        f"importance sampling from the same noise gives {float(other.value):.3f}, "
        f"{gap / error:.0f} of its errors away: the data are not draws of this law",
    )


def _rows(law: EnergyDistribution, data: Tensor) -> Tensor:
    if data.shape[1:] != law.event_shape or data.dim() == 0 or len(data) < 2:
        raise ValueError(
            f"data must be (N,) + {tuple(law.event_shape)} with N of at least 2, got "
            f"{tuple(data.shape)}"
        )
    return check_inside(law, data, "data")
