r"""The generalized energy-based model: an energy on top of a generator.

.. math:: dQ(x) = e^{-\beta E(x)}\, d(G_\# \eta)(x) / Z, \qquad Z = E_{z\sim\eta}\, e^{-\beta E(G(z))}

Its base has no density, so it has none either with respect to Lebesgue measure; it is sampled through the latent law
:math:`\nu(z) \propto \eta(z)\, e^{-\beta E(G(z))}`, :math:`x = G(z)`, which has the same Z.
:math:`\beta = 1` is the model; any other value samples a tempered law that is not the model.

Arbel, Zhou and Gretton, Generalized Energy-Based Models, ICLR 2021, arXiv:2003.05033.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_ebm.distributions.energy_distribution import EnergyDistribution, Sampler
from pyro_ebm.distributions.pushforward import PushforwardDistribution
from pyro_ebm.energies.base import Energy
from pyro_ebm.typing import BaseMeasure, EnergyFn


class GeneralizedEBM(EnergyDistribution):
    r"""An energy with respect to the law of a generator's output.

    Args:
        generator: Maps latents to observations.
        prior: The latent law, normalized.
        energy: ``x -> E(x)`` in nats on the output space.
        inverse_temperature: :math:`\beta`; multiplies the energy only.
        event_shape: Shape of one output; found by running the generator once if not given.
        log_normalizer: What is known of log Z with respect to the generator's law, as for ``EnergyDistribution``.
        sampler: ``(distribution, sample_shape) -> draws``; by default the latent law is sampled.
        validate_args: As everywhere in torch.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> prior = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        >>> model = GeneralizedEBM(lambda z: 2.0 * z, prior, lambda x: 0.5 * (x**2).sum(-1))
        >>> model.latent.energy(torch.ones(2))
        tensor(4.)
    """

    def __init__(
        self,
        generator: Callable[[Tensor], Tensor],
        prior: TorchDistribution,
        energy: EnergyFn,
        *,
        inverse_temperature: float | Tensor = 1.0,
        event_shape: torch.Size | tuple[int, ...] | None = None,
        log_normalizer: Any = None,
        sampler: Sampler | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.inverse_temperature = inverse_temperature
        base = PushforwardDistribution(generator, prior, event_shape=event_shape)
        super().__init__(
            energy,
            base,
            log_normalizer=log_normalizer,
            sampler=sampler,
            validate_args=validate_args,
        )

    @property
    def generator(self) -> Callable[[Tensor], Tensor]:
        """The map from latents to observations."""
        return self._pushforward.generator

    @property
    def prior(self) -> TorchDistribution:
        """The latent law."""
        return self._pushforward.prior

    @property
    def _pushforward(self) -> PushforwardDistribution:
        return self.base  # type: ignore[return-value]

    @property
    def base_measure(self) -> BaseMeasure:
        """Densities refer to the law of the generator's output."""
        return "generator"

    @property
    def is_tempered(self) -> bool:
        """Whether beta differs from 1, so that draws are not the model's."""
        return not (isinstance(self.inverse_temperature, Number) and self.inverse_temperature == 1)

    @property
    def latent(self) -> EnergyDistribution:
        """The latent law: base ``prior``, energy ``beta * E(generator(z))``, the same log Z."""
        return EnergyDistribution(
            LatentEnergy(self._energy, self.generator, self.inverse_temperature),
            self.prior,
            log_normalizer=self.log_normalizer,
            validate_args=self._validate_args,
        )

    def _energy_of(self, x: Tensor) -> Tensor:
        energy = super()._energy_of(x)
        return energy if not self.is_tempered else self.inverse_temperature * energy

    def _unnormalized(self, x: Tensor) -> Tensor:
        return -self._energy_of(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Raises: there is no density with respect to Lebesgue measure."""
        raise NotImplementedError(
            "a GeneralizedEBM has no density in x. Learn it from observations with pyro_ebm.infer.KALE or "
            "DonskerVaradhan; sample it in latent space with poutine.reparam(model, {site: LatentReparam()}); to "
            "condition on data, sample x without obs= and put a likelihood after x"
        )

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:
        """Returns ``generator(z)`` for ``z`` drawn from :attr:`latent` (or what ``sampler`` returns)."""
        if self.sampler is not None:
            return super().sample(sample_shape)
        z = self.latent.sample(sample_shape)
        with torch.no_grad():
            return self.generator(z)

    def temper(self, inverse_temperature: float | Tensor) -> EnergyDistribution:
        """Returns the law at another inverse temperature (multiplied into the present one)."""
        new = self._copy()
        new.inverse_temperature = inverse_temperature * self.inverse_temperature
        same = isinstance(inverse_temperature, Number) and inverse_temperature == 1
        new._log_normalizer = self._log_normalizer if same else None
        return new


class LatentEnergy(Energy):
    """The energy of a latent: ``beta * E(generator(z))``."""

    def __init__(
        self,
        energy: EnergyFn,
        generator: Callable[[Tensor], Tensor],
        inverse_temperature: float | Tensor,
    ) -> None:
        super().__init__()
        self.energy = energy
        self.generator = generator
        self.inverse_temperature = inverse_temperature

    def forward(self, z: Tensor) -> Tensor:
        """Returns the energy in nats, one value per latent event."""
        return self.inverse_temperature * self.energy(self.generator(z))
