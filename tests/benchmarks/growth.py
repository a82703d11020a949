"""How time and memory of a run grow with chains, dimensions and kept draws.

HMC on a hierarchical Pyro model with D - 2 group means, and for the limits on a standard normal;
one quantity varied at a time. Each setting runs in a process of its own on one core; time is the
sampling alone, per iteration and in processor seconds, memory the growth of the largest resident
size over what the libraries take. The exponent is the slope between the last two rows: 1 is linear.

    python tests/benchmarks/growth.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time

import pyro
import pyro.distributions as dist
import torch

from pyro_ebm.mcmc import HMC, MCMC

GRID = {
    "chains": [(c, 20, 100) for c in (16, 64, 256, 1024, 4096)],
    "dimensions": [(256, d, 50) for d in (10, 100, 1000, 4000)],
    "draws": [(256, 20, n) for n in (100, 400, 1600, 6400)],
    "limits": [(100_000, 2, 10), (256, 10_000, 20)],
}


def hierarchical(y: torch.Tensor) -> None:
    """Normal means of groups around a common one."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", len(y)):
        group = pyro.sample("group", dist.Normal(mean, spread))
        pyro.sample("y", dist.Normal(group, 1.0), obs=y)


def normal(dim: int) -> None:
    """A standard normal."""
    pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def largest() -> float:
    """Returns the largest resident size so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def run(chains: int, dim: int, draws: int) -> dict[str, float]:
    """Returns seconds per iteration, MiB, and the size of the draws in MiB."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    args = (hierarchical, torch.randn(dim - 2)) if 2 < dim < 10_000 else (normal, dim)
    sampler = MCMC(HMC(args[0]), 2, 40, num_chains=chains, disable_progbar=True)
    sampler.run(args[1])
    before, state = largest(), sampler.state
    sampler = MCMC(sampler.kernel, draws, 0, num_chains=chains, disable_progbar=True)
    begin = time.process_time()
    sampler.run(args[1], initial_state=state)
    seconds = (time.process_time() - begin) / draws
    kept = chains * draws * dim * 4 / 2**20
    return {"seconds": seconds, "MiB": largest() - before, "kept": kept}


def launched(*setting: int) -> dict[str, float]:
    """Returns what :func:`run` does, from a fresh process."""
    command = [sys.executable, __file__, "--one", *map(str, setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def show(name: str, settings: list[tuple[int, int, int]]) -> None:
    """Prints one table."""
    print(f"\n{name:12s} {'chains':>8s} {'D':>7s} {'draws':>6s} {'ms / iteration':>15s} "
          f"{'MiB':>7s} {'of it kept':>10s} {'exponent':>9s}")  # fmt: skip
    last: tuple[int, float] | None = None
    varied = {"chains": 0, "dimensions": 1, "draws": 2}.get(name)
    for setting in settings:
        found = launched(*setting)
        cost = found["MiB"] if name == "draws" else found["seconds"]
        slope = ""
        if varied is not None:
            if last is not None:
                slope = f"{math.log(cost / last[1]) / math.log(setting[varied] / last[0]):.2f}"
            last = setting[varied], cost
        print(f"{'':12s} {setting[0]:8d} {setting[1]:7d} {setting[2]:6d} "
              f"{1e3 * found['seconds']:15.2f} {found['MiB']:7.0f} {found['kept']:10.0f} "
              f"{slope:>9s}", flush=True)  # fmt: skip


def main() -> None:
    """Prints the tables, or runs one setting for the process that asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=int, nargs=3)
    parser.add_argument("--quick", action="store_true", help="only the smaller settings")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(*args.one)))
        return
    for name, settings in GRID.items():
        if not (args.quick and name == "limits"):
            show(name, settings[:3] if args.quick else settings)


if __name__ == "__main__":
    main()
