"""The short way: draws of one distribution by many short chains of a kernel."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.kernels.kernel import Kernel, check_untempered
from pyro_ebm.mcmc.runs.driver import MCMC
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.rank_rhat import worst_rhat

MIN_CHAINS = 32
MAX_RHAT = 1.1


def sample(
    dist: EnergyDistribution,
    sample_shape: torch.Size | tuple[int, ...] = (),
    *,
    kernel: Callable[[EnergyDistribution], Kernel] = HMC,
    num_steps: int = 100,
    warmup_steps: int = 300,
    disable_progbar: bool = True,
) -> Tensor:
    """Draws from a distribution: the last states of as many chains.

    Draws are independent of each other as far as the chains' starts are forgotten, which R-hat
    judges. It can be passed as ``sampler=`` of a distribution; bind other options by
    ``functools.partial``.

    Args:
        dist: An ``EnergyDistribution`` or ``GeneralizedEBM`` with a continuous support.
        sample_shape: Shape of the sample; its number is the number of chains, at least 32.
        kernel: Makes the kernel.
        num_steps: Iterations after the warm-up, at least four for R-hat.
        warmup_steps: Iterations that tune the kernel.
        disable_progbar: Hides the progress bar.

    Returns:
        Detached draws, ``sample_shape + batch_shape + event_shape``.

    Raises:
        TypeError: If the support is not continuous.
        ValueError: If there are fewer than four steps.

    Warns:
        ApproximateSampleWarning: If rank R-hat of a coordinate or of U exceeds 1.1, or the kernel
            is unadjusted.

    Example:
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=(), sampler=sample)
        >>> law.sample((40,)).shape
        torch.Size([40])
    """
    shape = torch.Size(sample_shape)
    made = kernel(dist)
    check_untempered(made, "sample")
    mcmc = MCMC(
        made,
        whole("num_steps", num_steps, least=4),
        warmup_steps,
        num_chains=max(MIN_CHAINS, shape.numel()),
        disable_progbar=disable_progbar,
    )
    mcmc.run()
    if not made.adjusted:
        warnings.warn(
            f"{type(made).__name__} has no accept step: its draws are of a law that is off by an "
            "amount that grows with its step size",
            ApproximateSampleWarning,
            stacklevel=2,
        )
    rhat = _worst_rhat(mcmc)
    if rhat > MAX_RHAT:
        warnings.warn(
            f"the chains of {dist!r} do not agree (rank R-hat {rhat:.2f} > {MAX_RHAT}): raise "
            "num_steps and warmup_steps, or run pyro_ebm.mcmc.MCMC and look at its diagnostics",
            ApproximateSampleWarning,
            stacklevel=2,
        )
    ends = mcmc.get_samples(1)["x"][:, 0]
    return ends[: shape.numel()].reshape(shape + ends.shape[1:])


def _worst_rhat(mcmc: MCMC) -> float:
    """Over the coordinates and U; infinite if one is not finite, one if nothing ever moves."""
    (draws,) = mcmc.get_samples(unconstrained=True).values()
    values = draws.reshape(draws.shape[:2] + (-1,))
    if "lp" in mcmc.diagnostics():
        values = torch.cat([values, mcmc.diagnostics()["lp"].unsqueeze(2)], 2)
    if not bool(torch.isfinite(values).all()):
        return math.inf
    return worst_rhat(values.transpose(0, 1))
