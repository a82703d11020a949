r"""Log Z as a function of parameters, from draws of the base that are held.

With draws :math:`z_1, \dots, z_S` of a base :math:`p_0`, made once,

.. math:: \log \hat Z(\theta) = \log \frac1S \sum_s e^{-E_\theta(z_s)}

is a smooth function with the slope and the curvature of its own, so that NUTS and SVI may infer
what any energy depends on through it, a network as well as an exponential family. It is the
importance estimate of :mod:`~pyro_ebm.normalizers.importance` with common random numbers; fresh
draws at every evaluation would leave neither a density nor a slope to follow. The base of the law
may have parameters of its own: weights are :math:`e^{-U_\theta(z_s)} / p_0(z_s)`, with the density
that was drawn from below.

**How far it holds.** For weak tilts: the effective number of draws S' falls as the law leaves its
base, exponentially in its dims. Where it is below a share of :data:`~.displacement.MIN_SHARE` the
function is NaN, and a kernel rejects what would lead there. With n observations and p parameters
the error of :math:`\log \hat Z` displaces a posterior by about :math:`\sqrt{pn / S'}` of its
standard deviations. A mode that no draw has come near is missed without a sign.

References:
    Geyer, Thompson, Constrained Monte Carlo maximum likelihood for dependent data, JRSS B 54, 1992
    (held draws); Vehtari, Simpson, Gelman, Yao, Gabry, Pareto smoothed importance sampling, JMLR
    25(72), 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.normalizers.beyond import Beyond
from pyro_ebm.normalizers.displacement import MIN_SHARE, RowsServed, displacement, refuse
from pyro_ebm.normalizers.growth import check_grows
from pyro_ebm.normalizers.importance import from_weights
from pyro_ebm.normalizers.laws import check_dims, law_of, normalized_on, single
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.held_draws import HeldDraws
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.log_space import effective_sample_size

_CHUNK = 2**22  # weights at once, of the error


class BaseImportance(HeldDraws):
    """Log Z of laws on one base, from draws of it.

    Made by :func:`base_importance`.

    Args:
        base: What was drawn from, a normalized distribution of one event.
        draws: Its draws, ``(S,) + event_shape``.
    """

    def __init__(self, base: Any, draws: Tensor) -> None:
        self.base = base
        self.draws = draws.detach()
        with torch.no_grad():
            self._log_density = base.log_prob(self.draws)
        self._is_looked_at = False
        self._served = RowsServed("effective draws of the base")
        self._beyond = Beyond(
            "of a law that the draws of its base say nothing of",
            "Use more draws, a base nearer to the law, normalizers.anchored",
        )

    @property
    def num_draws(self) -> int:
        """S."""
        return len(self.draws)

    def value(self, law: EnergyDistribution) -> Tensor:
        """Returns log Z in nats, of the law's batch shape; differentiable in what it depends on.

        Whether the density falls off is asked of the first law whose log Z is told: chains go on
        from there, and of every law it would cost as much as the weights.

        Args:
            law: A law with the event shape of the base, before plates expand it; its
                ``batch_shape`` names all dims of what its energy depends on. Of a generalized EBM
                the law over latents is meant.

        Raises:
            ValueError: If energies have other dims, or the law lives beyond the base.
            NonFiniteEnergyError: If Z of the first law is seen to be infinite.
        """
        log_weights = self.log_weights(law)
        value = torch.logsumexp(log_weights, 0) - math.log(self.num_draws)
        size = effective_sample_size(log_weights.detach())
        self._served.size = size
        held = size >= MIN_SHARE * self.num_draws
        self._look(law, held)
        return self._beyond.told(value, held).to(self.draws.dtype)

    def serve(self, rows: Tensor) -> None:
        """Takes for how many rows log Z is subtracted, and warns where they are too many."""
        self._served.told(rows)

    def _look(self, law: EnergyDistribution, held: Tensor) -> None:
        """Raises if Z of the first law that is told of is infinite; not seen under ``vmap``."""
        if self._is_looked_at or is_functorch_wrapped_tensor(held) or not bool(held.all()):
            return
        check_grows(law_of(law))
        self._is_looked_at = True

    def log_weights(self, law: EnergyDistribution) -> Tensor:
        """Returns the log weights of all draws, ``(S,) + batch_shape``.

        Args:
            law: As for a call.
        """
        law = law_of(law)
        normalized_on(law, self.base, "base of base_importance")
        lead = (self.num_draws,) + (1,) * len(law.batch_shape)
        check_dims(law, self.draws[0])
        log_p = law.unnormalized_log_prob(self.draws.reshape(lead + law.event_shape))
        return log_p.double() - self._log_density.double().reshape(lead)

    def effective_size(self, law: EnergyDistribution) -> Tensor:
        """Returns the effective number S' of draws, of the law's batch shape.

        Args:
            law: As for a call.
        """
        with torch.no_grad():
            return effective_sample_size(self.log_weights(law))

    def log_normalizer(self, law: EnergyDistribution) -> LogNormalizer:
        """Returns log Z of one law with its standard error, effective size and Pareto index.

        Args:
            law: A law with ``batch_shape == ()``.
        """
        law = single(law, "base_importance")
        with torch.no_grad():
            log_weights = self.log_weights(law)
        return from_weights(log_weights, "importance", start="base", law=law, at=self.draws[:1])

    def displacement(
        self, law: EnergyDistribution, num_observations: int, num_parameters: int
    ) -> Tensor:
        r"""Returns :math:`\sqrt{pn / S'}`: about how far a posterior mean is off, in its own sd's.

        Args:
            law: At parameters where the posterior is.
            num_observations: n, how often Z enters the likelihood.
            num_parameters: p, how many numbers the energy depends on.
        """
        return displacement(num_parameters, num_observations, self.effective_size(law))

    def check(self, law: EnergyDistribution, num_observations: int, num_parameters: int) -> None:
        """Raises unless the draws are enough for these observations at one law.

        Args:
            law: A law where the posterior is, such as at its mean; ``batch_shape == ()``.
            num_observations: n.
            num_parameters: p.

        Raises:
            ValueError: If the weights have too heavy a tail or too few of them count, or a
                posterior would be displaced by more than
                :data:`~.displacement.MAX_DISPLACEMENT` of its standard deviations.
        """
        found = self.log_normalizer(law)
        size = float(self.effective_size(law))
        if found.doubts or size < MIN_SHARE * self.num_draws:
            raise ValueError(
                f"the base is too far from the law for log Z by its draws: {found}. Use anchored "
                "draws of an exponential family, exchange, or a base nearer to the law"
            )
        off = float(self.displacement(law, num_observations, num_parameters))
        refuse(off, f"{size:.0f} effective draws of the base")

    def bootstrap(self, num_replicates: int) -> list[Callable[[EnergyDistribution], Tensor]]:
        """Returns functions of laws made of resampled draws, which show the error of this one.

        Args:
            num_replicates: Their number.
        """
        return [partial(self._resampled, counts) for counts in _counts(self.draws, num_replicates)]

    def _resampled(self, counts: Tensor, law: EnergyDistribution) -> Tensor:
        log_weights = self.log_weights(law)
        log_counts = counts.log().reshape((-1,) + (1,) * (log_weights.dim() - 1))
        value = torch.logsumexp(log_weights + log_counts, 0) - math.log(self.num_draws)
        return value.to(self.draws.dtype)

    def by(
        self, law: Callable[[Tensor], EnergyDistribution], num_parameters: int
    ) -> LogNormalizerBy:
        """Returns log Z by a vector of parameters, which ``mcse_logz`` tells the error of.

        Args:
            law: From parameters ``(..., p)`` to laws with the batch shape ``(...)``.
            num_parameters: p.
        """
        return LogNormalizerBy(self, law, num_parameters)


class LogNormalizerBy:
    """Log Z as a function of a vector of parameters; made by :meth:`BaseImportance.by`.

    Args:
        log_z: Log Z of laws.
        law: From parameters ``(..., p)`` to laws with the batch shape ``(...)``.
        num_parameters: p.
    """

    def __init__(
        self,
        log_z: BaseImportance,
        law: Callable[[Tensor], EnergyDistribution],
        num_parameters: int,
    ) -> None:
        self.log_z, self.law, self.num_parameters = log_z, law, num_parameters

    def __call__(self, parameters: Tensor) -> Tensor:
        """Returns log Z in nats, ``(...)``, for parameters ``(..., p)``."""
        return self.log_z(self.law(parameters))

    def share(self, parameters: Tensor) -> Tensor:
        """Returns the effective share of draws, ``(...)``, for parameters ``(..., p)``."""
        rows = parameters.reshape(-1, parameters.shape[-1]).split(self._at_once)
        sizes = torch.cat([self.log_z.effective_size(self.law(r)) for r in rows])
        return sizes.reshape(parameters.shape[:-1]) / self.log_z.num_draws

    @property
    def _at_once(self) -> int:
        return max(1, _CHUNK // self.log_z.num_draws)

    @torch.no_grad()
    def changes(self, parameters: Tensor, num_replicates: int) -> Tensor:
        """Returns by how much log Z of resampled draws differs, ``(num_replicates, ...)``.

        Args:
            parameters: ``(..., p)``.
            num_replicates: How often the draws are resampled.
        """
        rows = parameters.reshape(-1, parameters.shape[-1])
        counts = _counts(self.log_z.draws, num_replicates)
        shares = (self.log_z.log_weights(self.law(r)).softmax(0) for r in rows.split(self._at_once))
        found = torch.cat([(counts @ share).log() for share in shares], 1)
        return found.reshape(num_replicates, *parameters.shape[:-1])


def base_importance(base: Any, *, num_draws: int = 10_000) -> BaseImportance:
    """Returns log Z as a function of laws on a base, from draws of it that are made now.

    Make it once and before the model is run: draws inside of a model would be others in each run.

    Args:
        base: A normalized distribution with ``batch_shape == ()``: the base of the laws, or one
            with heavier tails; of a generalized EBM, its prior.
        num_draws: S. A posterior of p parameters given n rows asks for some ``10 p n`` effective
            ones (:meth:`BaseImportance.check`).

    Raises:
        ValueError: If it is called inside of a model, or there are fewer than two draws.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> base = dist.Normal(0.0, 1.0)
        >>> log_z = base_importance(base)
        >>> tilt = torch.tensor(0.5, requires_grad=True)
        >>> law = EnergyDistribution(lambda x: 0.5 * tilt * x**2, base)
        >>> law = law.with_log_normalizer(lambda bare=law: log_z(bare))
        >>> value = law.log_normalizer_value()  # -log(1 + tilt) / 2
        >>> value.backward()  # -1 / (2 (1 + tilt))
        >>> print(f"{value:.2f} {tilt.grad:.2f}")
        -0.20 -0.33
    """
    if am_i_wrapped():
        raise ValueError(
            "base_importance was called inside of a model, where its draws would be others in "
            "each run: make it once before, and call what it returns"
        )
    number = whole("num_draws", num_draws, least=2)
    with torch.no_grad():
        return BaseImportance(base, base.sample(torch.Size((number,))))


def _counts(draws: Tensor, num_replicates: int) -> Tensor:
    """How often each draw is in each of its resampled sets, ``(B, S)``."""
    shape = (num_replicates, len(draws))
    which = torch.randint(len(draws), shape, device=draws.device)
    ones = torch.ones(shape, dtype=torch.float64, device=draws.device)
    return torch.zeros_like(ones).scatter_add_(1, which, ones)
