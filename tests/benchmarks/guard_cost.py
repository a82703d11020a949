"""What the guard of log Z costs in a Pyro gradient.

One gradient of the potential of a NUTS kernel over a 16-dimensional EBM site. Its energy is a
network of three layers of 64 units. The gradient is timed with the guard on (``error``) and off
(``ignore``) in alternating blocks; the table shows medians over the blocks, of processor time,
since other processes may share the machine. *always* is the cost if every call were checked.

    python tests/benchmarks/guard_cost.py [--blocks 150] [--calls 64]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad

from pyro_ebm import EnergyDistribution
from pyro_ebm.distributions import guard_schedule
from pyro_ebm.energies import MLPEnergy

DIM = 16


def network_model() -> Callable[[], None]:
    """A registered network as energy."""
    net = MLPEnergy(DIM, (64, 64, 64), confinement=1.0)

    def model() -> None:
        pyro.sample("x", EnergyDistribution(pyro.module("net", net), event_shape=(DIM,)))

    return model


def closure_model() -> Callable[[], None]:
    """The same network in a closure, on top of a base that is built at every call."""
    net = MLPEnergy(DIM, (64, 64, 64))

    def model() -> None:
        base = dist.Normal(torch.zeros(DIM), 1.0).to_event(1)
        pyro.sample("x", EnergyDistribution(lambda x: net(x), base))

    return model


def tilted_model() -> Callable[[], None]:
    """An energy module that is built at every call."""
    net = MLPEnergy(DIM, (64, 64, 64), confinement=1.0)

    def model() -> None:
        pyro.sample("x", EnergyDistribution(net, event_shape=(DIM,)).temper(torch.tensor(0.9)))

    return model


def gradient_of(model: Callable[[], None]) -> Callable[[], object]:
    """Returns one evaluation of the potential and its gradient, as NUTS makes them."""
    init, potential, _, _ = initialize_model(model)
    return lambda: potential_grad(potential, init)


def block_seconds(gradient: Callable[[], object], policy: str, calls: int) -> float:
    """Returns seconds of this thread's processor time per call over a block of calls."""
    with pyro.settings.context(ebm_missing_normalizer=policy):
        start = time.thread_time()
        for _ in range(calls):
            gradient()
        return (time.thread_time() - start) / calls


def median(values: list[float]) -> float:
    """Returns the median."""
    return float(torch.tensor(values, dtype=torch.float64).median())


def measure(model: Callable[[], None], blocks: int, calls: int) -> tuple[float, float, float]:
    """Returns medians of the time off, the time on and their ratio, in alternating blocks."""
    with pyro.validation_enabled(False):
        gradient = gradient_of(model)
        block_seconds(gradient, "error", 200)
        off, on = [], []
        for block in range(blocks):
            order = ("ignore", "error") if block % 2 else ("error", "ignore")
            timed = {policy: block_seconds(gradient, policy, calls) for policy in order}
            off.append(timed["ignore"])
            on.append(timed["error"])
    ratios = [b / a for a, b in zip(off, on, strict=True)]
    return median(off), median(on), median(ratios)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=150)
    parser.add_argument("--calls", type=int, default=64, help="a multiple of 64")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    print(f"checked: {guard_schedule.FIRST_CALLS} calls, then every {guard_schedule.EVERY}th")
    print(f"{'energy':28s} {'off, ms':>8s} {'on, ms':>8s} {'cost':>7s} {'always':>7s}")
    for name, make in MODELS.items():
        off, on, ratio = measure(make(), args.blocks, args.calls)
        every, guard_schedule.EVERY = guard_schedule.EVERY, 1
        _, _, always = measure(make(), args.blocks // 4, args.calls)
        guard_schedule.EVERY = every
        cost, full = 100.0 * (ratio - 1.0), 100.0 * (always - 1.0)
        print(f"{name:28s} {1e3 * off:8.3f} {1e3 * on:8.3f} {cost:6.1f}% {full:6.1f}%")


MODELS = {
    "registered network": network_model,
    "closure, base of each call": closure_model,
    "energy built at each call": tilted_model,
}

if __name__ == "__main__":
    main()
