"""Effective draws per second on the posterior of a generator's latent, beside other libraries.

The target is z ~ N(0, I_16) under an energy of a generator's output; ``--weights`` names a file
with other weights ``g1 gb1 g2 gb2 e1 eb1 e2 eb2`` than those drawn here. All methods run 300
warm-up iterations and 300 draws from the same starts, on one core; seconds are of its processor
time. *end to end* counts compilation, warm-up and sampling. The last column is this package's HMC
over the method; none is printed where a method's means disagree with those of a long reference run.

    python tests/benchmarks/latent_posterior.py [--weights latent.npz] [--chains 64 256 1024]

The reference is cached in build/ and checked once against NumPyro's NUTS. BENCH_JAX_PYTHON names a
Python with blackjax and numpyro; their absence is told.
"""

from __future__ import annotations

import argparse
import dataclasses
import zlib
from pathlib import Path
from statistics import median

import numpy as np
from peers.launch import ROOT, available, is_installed, launch, set_environment
from peers.measures import mean_error, time_to_bias, worst_bulk_ess, worst_rhat
from peers.outputs import Run
from peers.targets import TARGETS, Target, weights

FAR = 5.0  # standard errors
SIZES = (300, 300)
METHODS: list[tuple[str, int, int]] = [  # method, warm-up, draws
    ("HMC", *SIZES),
    ("ChEESHMC", *SIZES),
    ("NUTS", *SIZES),
    ("EllipticalSlice", *SIZES),
    ("blackjax_chees", *SIZES),
    ("blackjax_chees", 1000, 300),
    ("blackjax_chees_diagonal", *SIZES),
    ("numpyro_nuts", *SIZES),
    ("blackjax_mclmc", *SIZES),
    ("blackjax_laps", *SIZES),
    ("ebmkit_nuts", *SIZES),
    ("pyro_nuts", *SIZES),
]
Numbers = dict[str, float]


def reference(limit: float) -> dict[str, np.ndarray]:
    """Returns means, their errors and standard deviations of a long run, cached."""
    key = zlib.crc32(b"".join(w.tobytes() for w in weights().values()))
    cache = ROOT / "build" / f"latent_reference_{key:08x}.npz"
    if not cache.exists():
        run = long_run("HMC", (1024, 500, 2000), limit)
        cache.parent.mkdir(exist_ok=True)
        flat = run.draws.reshape(-1, run.draws.shape[-1]).astype(float)
        found = {"mean": flat.mean(0), "sd": flat.std(0), "error": mean_error(run.draws)}
        print(f"reference: {worst_bulk_ess(run.draws):.0f} effective draws")
        cross_check(found, limit)
        np.savez(cache, **found)
    return dict(np.load(cache))


def long_run(method: str, sizes: tuple[int, int, int], limit: float) -> Run:
    """Returns a run with four times the limit; raises if there is none."""
    run = launch("latent", method, sizes, seed=101, limit=4 * limit)
    failure = run if isinstance(run, str) else ""
    if failure:
        raise RuntimeError(f"{method}, for the reference: {failure}")
    return run


def cross_check(found: dict[str, np.ndarray], limit: float) -> None:
    """Compares the reference with a long run of another library; raises if they disagree."""
    if not is_installed("numpyro_nuts"):
        print("reference: NumPyro is not installed, nothing to check it against")
        return
    other = long_run("numpyro_nuts", (256, 500, 1000), limit)
    z = distance(other.draws, found)
    flat = other.draws.reshape(-1, other.draws.shape[-1]).astype(float)
    ratio = flat.std(0) / found["sd"]
    print(
        f"reference: NumPyro's means within {z:.1f} standard errors, sd ratios {ratio.min():.4f}"
        f" to {ratio.max():.4f}"
    )
    if z > FAR:
        raise RuntimeError("the reference run and NumPyro's disagree")


def with_reference(target: Target, limit: float) -> Target:
    """Returns the target with the reference's moments for true ones."""
    found = reference(limit)
    return dataclasses.replace(target, mean=found["mean"], sd=found["sd"])


def distance(draws: np.ndarray, truth: dict[str, np.ndarray]) -> float:
    """Returns the largest distance of a mean from the reference, in their standard errors."""
    error = np.hypot(mean_error(draws), truth["error"])
    return float((np.abs(draws.mean((0, 1), dtype=float) - truth["mean"]) / error).max())


def numbers(run: Run, target: Target, truth: dict[str, np.ndarray]) -> Numbers:
    """Returns what the table shows of one run."""
    ess = worst_bulk_ess(run.draws)
    seconds, gradients = time_to_bias(run, target) or (np.inf, np.inf)
    return {
        "ESS/s": ess / run.seconds,
        "sampling": ess / run.sampling,
        "before": run.before,
        "ESS/grad": ess / run.draws.shape[0] / run.draws.shape[1] / run.draw_gradients,
        "ms/grad": 1e3 * run.per_gradient,
        "bias s": seconds,
        "bias grad": gradients,
        "R-hat": worst_rhat(run.draws),
        "z": distance(run.draws, truth),
    }


def row(method: tuple[str, int, int], chains: int, args: argparse.Namespace) -> Numbers | str:
    """Returns the medians over repeats, or why there are none."""
    target, truth = with_reference(TARGETS["latent"](), args.limit), reference(args.limit)
    name, *sizes = method
    found = []
    for seed in range(args.repeats):
        run = launch("latent", name, (chains, *sizes), seed=seed, limit=args.limit)
        if isinstance(run, str):
            return run
        found.append(numbers(run, target, truth))
    return {key: median(n[key] for n in found) for key in found[0]}


def ratio(own: Numbers | str, other: Numbers) -> str:
    """Returns how many times more effective draws a second this package makes."""
    if isinstance(own, str):
        return "-"
    off = other["z"] > FAR or own["z"] > FAR
    return "moments off" if off else f"{own['ESS/s'] / other['ESS/s']:.2f}"


def show(chains: int, rows: dict[tuple[str, int, int], Numbers | str]) -> None:
    """Prints one table."""
    own = rows.get(METHODS[0], "not run")
    keys = (
        "ESS/s",
        "sampling",
        "before",
        "ESS/grad",
        "ms/grad",
        "bias s",
        "bias grad",
        "R-hat",
        "z",
    )
    header = "".join(f"{key:>10s}" for key in keys)
    print(f"\n{f'{chains} chains':36s}{header}   ours / it")
    for (name, warmup, _), found in rows.items():
        label = f"{name}, {warmup} warm-up"
        if isinstance(found, str):
            print(f"{label:36s}{found:>10s}")
            continue
        cells = "".join(f"{found[k]:10.{0 if found[k] >= 100 else 3}f}" for k in keys)
        print(f"{label:36s}{cells}   {ratio(own, found)}", flush=True)


def parsed() -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--chains", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--methods", nargs="+", default=sorted({name for name, *_ in METHODS}))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300.0)
    return parser.parse_args()


def main() -> None:
    """Prints a table per number of chains."""
    args = parsed()
    set_environment(args.weights)
    names = available(args.methods)
    for chains in args.chains:
        methods = [method for method in METHODS if method[0] in names]
        show(chains, {method: row(method, chains, args) for method in methods})


if __name__ == "__main__":
    main()
