"""``EnergyDistribution`` and ``GeneralizedEBM`` as targets."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.distributions.gaussian_base import GaussianBase
from pyro_ebm.distributions.layers import unvalidated
from pyro_ebm.mcmc.targets.target import (
    GaussianPrior,
    Target,
    Values,
    check_names,
    lead_of,
)
from pyro_ebm.ops.constraints import base_measure, plain
from pyro_ebm.ops.initial_points import initial_points, like_of
from pyro_ebm.ops.spaces import UnconstrainedSpace


class DistributionTarget(Target):
    """A distribution's own density, batch elements side by side in one position.

    A generalized EBM is sampled in its latent space: the values are ``x_latent`` and ``x``.

    Args:
        dist: The distribution.

    Raises:
        TypeError: If the support is not continuous.
        NotImplementedError: If no bijection from the reals leads to the support.
    """

    def __init__(self, dist: EnergyDistribution) -> None:
        self.dist = dist
        self.law = unvalidated(dist.latent if isinstance(dist, GeneralizedEBM) else dist)
        _check_continuous(self.law)
        self.space = UnconstrainedSpace.of(self.law.support, self.law.event_shape)
        self._is_real = isinstance(plain(self.law.support), type(constraints.real))
        self.shape = self.law.batch_shape + self.space.shape
        self.dim = prod(self.shape)
        self.prior = _gaussian_prior(self.law, like=self.draw_start(1))

    def __repr__(self) -> str:
        return repr(self.dist)

    def potential(self, q: Tensor) -> Tensor:
        """Returns U in nats, summed over the batch of the distribution."""
        if self._is_real:
            return _over_batch(self._density(self._shaped(q)))
        x, log_det = self.space.with_log_det(self._coordinates(q))
        return _over_batch(self._density(x) - log_det)

    def _density(self, x: Tensor) -> Tensor:
        return self.law.energy(x) if self.law.base is None else self.law.potential(x)

    def energy(self, q: Tensor) -> Tensor:
        """Returns E with respect to the base in nats, ``(C,)``."""
        if self.law.base is None:
            return super().energy(q)
        return _over_batch(self.law.energy(self._on_support(q)))

    def _on_support(self, q: Tensor) -> Tensor:
        return self._shaped(q) if self._is_real else self.space.to_support(self._coordinates(q))

    def _coordinates(self, q: Tensor) -> Tensor:
        return q.reshape(q.shape[:-1] + self.law.batch_shape + (self.space.size,))

    def _shaped(self, q: Tensor) -> Tensor:
        return q.reshape(q.shape[:-1] + self.shape)

    @torch.no_grad()
    def constrain(self, q: Tensor) -> Values:
        """Returns ``x``, and ``x_latent`` of a generalized EBM."""
        x = self._on_support(q)
        if not isinstance(self.dist, GeneralizedEBM):
            return {"x": x}
        images = self.dist.generator(x.reshape((-1,) + x.shape[q.dim() - 1 :]))
        return {"x": images.reshape(q.shape[:-1] + images.shape[1:]), "x_latent": x}

    @property
    def _name(self) -> str:
        return "x_latent" if isinstance(self.dist, GeneralizedEBM) else "x"

    def split(self, q: Tensor) -> Values:
        """Returns the unconstrained ``x``, of a generalized EBM ``x_latent``."""
        return {self._name: self._shaped(q)}

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns positions for the unconstrained value.

        Raises:
            ValueError: If a name is missing or unknown, or a shape does not fit.
        """
        check_names(values, {self._name})
        u = values[self._name]
        return u.reshape(lead_of(self._name, u, self.shape) + (self.dim,))

    def position_of(self, x: Tensor) -> Tensor:
        """Returns positions ``lead + (D,)`` for values of the sampled law, on their support."""
        u = self.space.to_unconstrained(x)
        return u.reshape(u.shape[: u.dim() - len(self.law.batch_shape) - 1] + (self.dim,))

    @torch.no_grad()
    def draw_start(self, num_chains: int) -> Tensor:
        """Draws from the base, or spread over the support where there is none."""
        law, lead = self.law, torch.Size((num_chains,))
        if law.base is not None:
            x = law.base.sample(lead)
        else:
            like = like_of(law.energy_function)
            x = initial_points(
                law.support,
                lead + law.batch_shape,
                law.event_shape,
                dtype=like.dtype,
                device=like.device,
            )
        return self.position_of(x)


def _over_batch(value: Tensor) -> Tensor:
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def _check_continuous(law: EnergyDistribution) -> None:
    if base_measure(law.support) != "lebesgue":
        raise TypeError(
            f"{law!r} lives on {law.support}, which has no real coordinates to move along; draw it "
            "by a kernel for its support"
        )


def _gaussian_prior(law: EnergyDistribution, like: Tensor) -> GaussianPrior | None:
    """The base as a Gaussian in the flat coordinates, if it is one with independent coordinates."""
    base = GaussianBase.of(law.base)
    if base is None or not base.is_diagonal:
        return None
    flat = [t.detach().flatten().to(like.dtype) for t in (base.loc, base.scale)]
    return GaussianPrior(*flat)
