r"""The law of a generator's output, :math:`x = G(z),\ z \sim \eta`: drawn, without a density.

As a guide site it is the natural base of KALE and the generator of an MMD fit: every draw is fresh,
where a ``Delta(generator(z))`` would repeat one point.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro.poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from pyro_ebm.ops.constraints import event_support
from pyro_ebm.ops.evaluation_mode import evaluation_mode
from pyro_ebm.ops.rng import rng_preserved


class PushforwardDistribution(TorchDistribution):
    r"""The law of ``generator(z)`` for ``z`` drawn from ``prior``.

    Args:
        generator: Maps latents of shape ``sample + batch + latent event`` to ``sample + batch +
            event``.
        prior: The latent law.
        event_shape: Shape of one output; found by running the generator once if not given.
        support: Support of the output; real numbers if not given.
        validate_args: As everywhere in torch.

    Raises:
        TypeError: If the generator is not callable or the prior is not a distribution.
        ValueError: If the generator does not keep the leading dims of its input.
        NotImplementedError: From :meth:`log_prob`.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> prior = dist.Normal(0.0, 1.0).expand([1]).to_event(1)
        >>> law = PushforwardDistribution(lambda z: torch.cat([z, z**2], -1), prior)
        >>> law.event_shape, law.rsample((5,)).shape
        (torch.Size([2]), torch.Size([5, 2]))
    """

    arg_constraints: dict[str, Constraint] = {}

    def __init__(
        self,
        generator: Callable[[Tensor], Tensor],
        prior: TorchDistribution,
        *,
        event_shape: torch.Size | tuple[int, ...] | None = None,
        support: Constraint | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not callable(generator):
            raise TypeError(f"generator must be callable, z -> x, got {type(generator).__name__}")
        if not isinstance(prior, torch.distributions.Distribution):
            raise TypeError(
                "prior must be a Pyro distribution, for example "
                f"dist.Normal(0, 1).expand([2]).to_event(1), got {type(prior).__name__}"
            )
        self.generator = generator
        self.prior = prior
        event = _event_shape(generator, prior) if event_shape is None else torch.Size(event_shape)
        real = torch.distributions.constraints.real
        self._support = event_support(real if support is None else support, len(event))
        super().__init__(prior.batch_shape, event, validate_args=validate_args)

    @property
    def support(self) -> Constraint:
        """The support of the output."""
        return self._support

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients: as the prior's do."""
        return bool(self.prior.has_rsample)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Returns draws with gradients to the generator and, if it has them, to the prior."""
        return self.generator(self.prior.rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Returns detached draws, shape ``sample_shape + batch_shape + event_shape``."""
        with torch.no_grad():
            return self.generator(self.prior.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises: the law of a generator's output has no density."""
        raise NotImplementedError(
            "a PushforwardDistribution has no density: as a contrast (guide site under KALE or "
            "EnergyDiscrepancy) it needs none; for a likelihood put one after it, e.g. "
            "pyro.sample('obs', dist.Normal(x, sigma), obs=data); an invertible generator is "
            "dist.TransformedDistribution; an energy on top of one is "
            "GeneralizedEBM(generator, prior, energy)"
        )

    def expand(
        self,
        batch_shape: torch.Size | tuple[int, ...],
        _instance: PushforwardDistribution | None = None,
    ) -> PushforwardDistribution:
        """Returns the same law with the prior expanded to ``batch_shape``."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new.prior = self.prior.expand(torch.Size(batch_shape))
        new._batch_shape = torch.Size(batch_shape)
        return new


def _event_shape(generator: Callable[[Tensor], Tensor], prior: Any) -> torch.Size:
    """Runs the generator on one latent.

    It leaves the random state, running statistics, the enclosing trace and a graph that is being
    recorded as they are.
    """
    modules = [generator] if isinstance(generator, nn.Module) else []
    aside = (rng_preserved(), evaluation_mode(modules), disable_proxy_modes_tracing())
    with torch.no_grad(), pyro.poutine.block(), ExitStack() as stack:
        for context in aside:
            stack.enter_context(context)
        z = prior.sample()
        x = _output(generator, z)
    batch = z.shape[: z.dim() - len(prior.event_shape)]
    if x.shape[: len(batch)] != batch:
        raise ValueError(
            f"generator returned shape {tuple(x.shape)} for latents of shape {tuple(z.shape)}; "
            f"expected the leading dims {tuple(batch)} to be kept"
        )
    return x.shape[len(batch) :]


def _output(generator: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    try:
        x = generator(z)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"generator failed on one latent of shape {tuple(z.shape)}: {error}. It must take any "
            "leading dims: pyro_ebm.energies.RowWise(network, event_dim) makes it"
        ) from error
    if not isinstance(x, Tensor):
        raise TypeError(f"generator must return a tensor, got {type(x).__name__}")
    return x
