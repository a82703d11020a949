"""What estimators ask of a distribution before they begin."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.mcmc import Kernel

KernelMaker = Callable[[EnergyDistribution], Kernel]


def law_of(dist: EnergyDistribution) -> EnergyDistribution:
    """Returns the distribution whose log Z is meant: of a generalized EBM, the one over latents.

    Raises:
        TypeError: If it is not an ``EnergyDistribution``.
    """
    if not isinstance(dist, EnergyDistribution):
        raise TypeError(
            f"log Z is asked of an EnergyDistribution, got {type(dist).__name__}: for a site of a "
            "model use pyro_ebm.unwrap"
        )
    return dist.latent if isinstance(dist, GeneralizedEBM) else dist


def single(dist: EnergyDistribution, estimator: str) -> EnergyDistribution:
    """Returns the law if it is one, not a batch.

    Raises:
        ValueError: If it has a batch shape.
    """
    law = law_of(dist)
    if law.batch_shape != ():
        raise ValueError(
            f"{estimator} estimates one log Z, and batch_shape is {tuple(law.batch_shape)}: "
            "estimate the elements one by one"
        )
    return law


def based(dist: EnergyDistribution, estimator: str) -> EnergyDistribution:
    """Returns the law if it is one and has a base to start from.

    Raises:
        ValueError: If it has no base, or a batch shape.
    """
    law = single(dist, estimator)
    if law.base is None:
        raise ValueError(
            f"{estimator} starts from exact draws of the base, and {dist!r} has none: give base="
        )
    return law


def leaves_of(law: EnergyDistribution) -> tuple[Tensor, ...]:
    """Returns the parameters of the energy's module, whose change makes an estimate stale."""
    energy = law.energy_function
    return tuple(energy.parameters()) if isinstance(energy, nn.Module) else ()
