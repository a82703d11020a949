r"""The generalized energy-based model: an energy on top of a generator.

.. math:: dQ(x) = e^{-\beta E(x)}\, d(G_\# \eta)(x) / Z, \qquad Z = E_{z\sim\eta}\, e^{-\beta
E(G(z))}

Its base has no density, so it has none either with respect to Lebesgue measure; it is sampled
through the latent law :math:`\nu(z) \propto \eta(z)\, e^{-\beta E(G(z))}`, :math:`x = G(z)`, which
has the same Z. :math:`\beta = 1` is the model; any other value samples a tempered law that is not
the model.

Arbel, Zhou and Gretton, Generalized Energy-Based Models, ICLR 2021, arXiv:2003.05033.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import pyro.poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_ebm.distributions.energy_distribution import EnergyDistribution, Sampler
from pyro_ebm.distributions.pushforward import PushforwardDistribution
from pyro_ebm.energies.base import Energy, ScaledEnergy, SumEnergy
from pyro_ebm.typing import BaseMeasure, EnergyFn


class GeneralizedEBM(EnergyDistribution):
    r"""An energy with respect to the law of a generator's output.

    Args:
        generator: Maps latents to observations.
        prior: The latent law, normalized.
        energy: ``x -> E(x)`` in nats on the output space.
        inverse_temperature: :math:`\beta`; multiplies the energy only.
        event_shape: Shape of one output; found by running the generator once if not given.
        log_normalizer: What is known of log Z with respect to the generator's law, as for
            ``EnergyDistribution``.
        sampler: ``(distribution, sample_shape) -> draws``; by default the latent law is sampled.
        conditional: Whether the energy depends on row-wise values other than ``x``; ``None`` lets
            objectives test.
        validate_args: As everywhere in torch.

    Raises:
        TypeError: If the generator or the energy is not callable, or the prior is not a
            distribution.
        ValueError: If the prior is an EBM with unknown log Z, or the generator does not keep
            leading dims.

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
        conditional: bool | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _check_normalized(prior)
        self.inverse_temperature = inverse_temperature
        base = PushforwardDistribution(generator, prior, event_shape=event_shape)
        super().__init__(
            energy,
            base,
            log_normalizer=log_normalizer,
            sampler=sampler,
            conditional=conditional,
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
        energy = LatentEnergy(self._energy, self.generator, self.inverse_temperature)
        with self.fixed_weights():
            return EnergyDistribution(
                energy,
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
            "a GeneralizedEBM has no density in x. Learn it from observations with "
            "pyro_ebm.infer.KALE or DonskerVaradhan; sample it in latent space with "
            "poutine.reparam(model, {site: LatentReparam()}); to condition on data, sample x "
            "without obs= and put a likelihood after x"
        )

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Returns ``generator(z)``, z drawn from :attr:`latent`, or what ``sampler`` returns."""
        if self.sampler is not None:
            return super().sample(sample_shape)
        z = self.latent.sample(sample_shape)
        with torch.no_grad(), pyro.poutine.block(), self.fixed_weights():
            return self.generator(z)

    def temper(self, inverse_temperature: float | Tensor) -> EnergyDistribution:
        """Returns the law at another inverse temperature (multiplied into the present one).

        Log Z stays known at a factor of 1, and is 0 at a factor of 0.
        """
        new = self._copy()
        new.inverse_temperature = (
            inverse_temperature * self.inverse_temperature
            if self.is_tempered
            else inverse_temperature
        )
        if not (isinstance(inverse_temperature, Number) and inverse_temperature == 1):
            off = isinstance(inverse_temperature, Number) and inverse_temperature == 0
            new._log_normalizer = 0.0 if off else None
            new._sampler_is_exact = False
        return new

    def tilt(self, energy: EnergyFn) -> EnergyDistribution:
        """Returns the law with energy beta E + ``energy`` on the same base.

        Beta becomes part of the energy.
        """
        own = (
            ScaledEnergy(self._energy, self.inverse_temperature)
            if self.is_tempered
            else self._energy
        )
        new = self._with_energy(SumEnergy(own, energy), energy)
        new.inverse_temperature = 1.0
        return new

    def as_base(self, energy: EnergyFn) -> EnergyDistribution:
        """Raises: a base needs a density."""
        raise NotImplementedError(
            "a GeneralizedEBM has no density and cannot be a base: tilt(energy) is the same law, "
            "with unknown log Z"
        )


def _check_normalized(prior: Any) -> None:
    if not getattr(prior, "is_normalized", True):
        raise ValueError(
            f"the prior of a GeneralizedEBM must be normalized, got {prior!r}: give it a "
            "log_normalizer"
        )


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
