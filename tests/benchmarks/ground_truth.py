"""Seconds until the bias is small, on targets with known moments, beside other libraries.

Every method starts all chains uniformly in (-2, 2) and runs at warm-ups of several lengths; its
best counts. The time is compilation, warm-up and as many draws of all chains as it takes until the
worst squared bias of an observable's mean and variance stays below .01; a method that does not get
there shows the smallest squared bias that it ended with. Seconds are of processor
time on one core. In brackets are gradients per chain and the length of the warm-up. A method that
compiles its program pays for that in seconds, and not in gradients.

    python tests/benchmarks/ground_truth.py [--chains 256] [--weights latent.npz] [--targets ...]

BENCH_JAX_PYTHON names a Python with blackjax, numpyro and inference_gym; their absence is told.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import latent_posterior
from peers.launch import available, launch, set_environment
from peers.measures import squared_bias, time_to_bias
from peers.outputs import Run
from peers.targets import TARGETS, Target

METHODS = [
    "ChEESHMC",
    "HMC",
    "NUTS",
    "blackjax_chees",
    "blackjax_chees_diagonal",
    "numpyro_nuts",
    "blackjax_mclmc",
    "blackjax_laps",
]
WARMUPS = [50, 100, 200, 400, 800]


@dataclass(frozen=True)
class Best:
    """A method's best over the lengths of the warm-up."""

    seconds: float
    gradients: float
    warmup: int
    run: Run

    def __str__(self) -> str:
        return f"{self.seconds:.1f} ({self.gradients:.0f}, {self.warmup})"


def best(target: Target, method: str, args: argparse.Namespace) -> Best | str:
    """Runs the lengths of warm-up in turn, as long as a longer one may be faster."""
    found: Best | None = None
    said, smallest = "", float("inf")
    for warmup in args.warmups:
        sizes = (args.chains, warmup, args.draws)
        run = launch(target.name, method, sizes, seed=args.seed, limit=args.limit)
        if isinstance(run, str):
            said = run
            continue  # a longer warm-up may tune better
        if found is not None and run.before > found.seconds:
            break
        smallest = min(smallest, float(squared_bias(run.draws, target)[-1]))
        reached = time_to_bias(run, target)
        if reached is not None and (found is None or reached[0] < found.seconds):
            found = Best(*reached, warmup, run)
    return found or said or f"bias^2 {smallest:.2g}"


def load(name: str, args: argparse.Namespace) -> Target | None:
    """Returns a target with its true moments, or says why it is left out."""
    try:
        target = TARGETS[name]()
        return latent_posterior.with_reference(target, args.limit) if name == "latent" else target
    except (FileNotFoundError, ModuleNotFoundError) as error:
        print(f"left out: {name}: {error}")
        return None


def parsed() -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=256)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--warmups", type=int, nargs="+", default=WARMUPS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Prints a row per target as it is measured."""
    args = parsed()
    set_environment(args.weights)
    methods = available(args.methods)
    print("seconds (gradients per chain, warm-up)")
    print(f"{'':22s}" + "".join(f"{method:>24s}" for method in methods))
    costs = {}
    for name in args.targets:
        target = load(name, args)
        if target is None:
            continue
        cells = {method: best(target, method, args) for method in methods}
        costs[name] = [c.run.per_gradient if isinstance(c, Best) else None for c in cells.values()]
        print(f"{name:22s}" + "".join(f"{cells[m]!s:>24s}" for m in methods), flush=True)
    print("\nmilliseconds per gradient of all chains, compilation aside")
    for name, row in costs.items():
        shown = ("-" if cost is None else f"{1e3 * cost:.2f}" for cost in row)
        print(f"{name:22s}" + "".join(f"{cell:>24s}" for cell in shown))


if __name__ == "__main__":
    main()
