r"""Log Z by sequential Monte Carlo on a ladder that is held.

A first run finds the ladder and the kernel's tuning; its own estimate is biased, because ladder and
weights come from the same particles, and has no honest error. R further runs keep both: each is
unbiased for Z, their mean is the estimate, and their spread the error. Discrete laws are reached by
sweeps, all runs in one batch (:mod:`~pyro_ebm.normalizers.discrete_smc`); without a base from the
uniform law on their states.

Reference:
    Del Moral, Doucet, Jasra, Sequential Monte Carlo samplers, JRSS B 68, 2006.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.mcmc import HMC, SMC, SMCPlan
from pyro_ebm.normalizers.discrete_path import DiscretePath, is_discrete
from pyro_ebm.normalizers.discrete_smc import pilot_ladder, runs_on
from pyro_ebm.normalizers.laws import KernelMaker, based, parameters_at, single
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.log_space import effective_sample_size, log_mean_exp
from pyro_ebm.ops.nan_energies import NaNCount

SPREAD = 1.0
"""Nats between runs above which their mean rests on one or two of them."""

MIN_RUNS = 10
"""Runs whose spread tells an error: 95 per cent intervals from 2, 3 and 5 cover 70, 81 and 88."""


def smc(
    dist: EnergyDistribution,
    *,
    num_particles: int = 1000,
    num_runs: int = 20,
    kernel: KernelMaker | None = None,
) -> LogNormalizer:
    """Estimates log Z by sequential Monte Carlo.

    Args:
        dist: A distribution with a base and ``batch_shape == ()``; one on finitely many states
            needs none.
        num_particles: Particles of each run.
        num_runs: R, independent runs on one ladder; at least 10 for an interval.
        kernel: Makes the kernel of the moves; HMC if not given. Discrete laws take none: they move
            by sweeps.

    Returns:
        ``LogNormalizer`` in nats, its standard error from the spread of the runs.

    Raises:
        ValueError: If the distribution has nothing to start from or is a batch, or a kernel is
            given for a discrete one.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
        >>> estimate = smc(law, num_particles=200)
        >>> bool((estimate.value + 0.3466).abs() < 0.05)  # minus log(2) / 2
        True
    """
    law = single(dist, "sequential Monte Carlo")
    sizes = whole("num_runs", num_runs, least=2), whole("num_particles", num_particles, least=2)
    if is_discrete(law):
        return _of_states(law, sizes, kernel)
    law = based(dist, "sequential Monte Carlo")
    kernel = kernel or HMC
    plan = _run(law, num_particles, kernel, None).plan
    runs = [_run(law, num_particles, kernel, plan) for _ in range(num_runs)]
    seen = NaNCount()
    for run in runs:
        seen += run.nan_energies
    values = torch.stack([run.log_normalizer for run in runs])
    return _from_runs(values, law, num_runs * num_particles, "base", seen)


def _of_states(
    law: EnergyDistribution, sizes: tuple[int, int], kernel: KernelMaker | None
) -> LogNormalizer:
    if kernel is not None:
        raise ValueError(f"{law!r} is discrete and moves by sweeps: leave kernel= out")
    num_runs, num_particles = sizes
    path = DiscretePath(law)
    ladder = pilot_ladder(path, num_particles)
    path.seen = NaNCount()
    values = runs_on(path, ladder, num_runs=num_runs, num_particles=num_particles)
    return _from_runs(
        values + path.log_mass, law, values.numel() * num_particles, path.start, path.seen
    )


def _from_runs(
    values: Tensor, law: EnergyDistribution, num_samples: int, start: str, seen: NaNCount
) -> LogNormalizer:
    """The mean of Z over independent runs, whose spread is the error."""
    num_runs, spread = len(values), float(values.std())
    share = float(effective_sample_size(values)) / num_runs
    few = f"{num_runs} runs do not tell an error: use {MIN_RUNS} or more (num_runs=)"
    wide = f"the runs differ by {spread:.2g} nats: use more particles or moves"
    return LogNormalizer(
        log_mean_exp(values),
        values.new_tensor((max(1.0 / share - 1.0, 0.0) / (num_runs - 1)) ** 0.5),
        "smc",
        num_samples=num_samples,
        start=start,
        remarks=(
            *seen.remarks,
            *((few,) if num_runs < MIN_RUNS else ()),
            *((wide,) if spread > SPREAD else ()),
        ),
        parameters=parameters_at(law),
    )


def _run(
    law: EnergyDistribution, num_particles: int, kernel: KernelMaker, plan: SMCPlan | None
) -> SMC:
    run = SMC(law, num_particles, kernel=kernel, plan=plan, disable_progbar=True)
    run.run()
    return run
