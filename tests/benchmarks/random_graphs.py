"""Effective draws per second on posteriors of random graphs, beside ergmx and stock Pyro.

Three networks that ergmx ships, each with its default prior. ergmx runs 4 chains of 100 + 3000
iterations with its defaults, this package many chains in one batch. On the first network each
auxiliary network of ours starts at the data and goes through as many dyads, bridges included, as
ergmx proposes toggles. On the others it is drawn by its weight from a pool of networks that are
simulated once at about the maximum likelihood estimate, and on the second swept over once; so it is
at every bridge. Stock Pyro is one chain with a kernel in plain torch. Seconds are of processor time
on one core, over the whole call: for ours with the simulation of the pool, from which the surrogate
is made as well, and with the warm-up. *z* is the largest distance of a posterior mean from that of
a run of ours with four times the sweeps and another seed, hence a pool of its own, in standard
errors of both; the error of a pool is not in these.

    python tests/benchmarks/random_graphs.py [--networks zach] [--methods ours ergmx] [--reference]

It needs ``pip install ergmx igraph`` (Python 3.11 or later).
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers.launch import FOLDER
from peers.measures import mean_error, worst_bulk_ess, worst_rhat
from peers.outputs import Run

METHODS = ["ours", "ergmx", "stock"]
SETTINGS: dict[str, dict[str, tuple[int, ...]]] = {  # chains, warm-up, draws, sweeps, bridges
    "flomarriage": {
        "ours": (1024, 40, 300, 5, 3),
        "ergmx": (4, 100, 3000, 0, 0),
        "stock": (1, 20, 200, 0, 0),
    },
    "zach": {
        "ours": (512, 40, 300, 1, 5),
        "ergmx": (4, 100, 3000, 0, 0),
        "stock": (1, 20, 100, 0, 0),
    },
    "faux.mesa.high": {
        "ours": (128, 40, 300, 0, 5),
        "ergmx": (4, 100, 3000, 0, 0),
        "stock": (1, 4, 40, 0, 0),
    },
}


def launch(
    network: str,
    method: str,
    settings: tuple[int, ...],
    args: argparse.Namespace,
    *,
    seed: int | None = None,
) -> Run:
    """Runs a method in a process of its own; raises if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        sizes, aux = settings[:3], settings[3:]
        seed = args.seed if seed is None else seed
        numbers = [str(number) for number in (*sizes, seed)]
        command = [sys.executable, "-m", "peers.graph_samplers", network, method, *numbers]
        command += [str(out), *map(str, aux)]
        subprocess.run(command, cwd=FOLDER, timeout=args.limit, check=True)
        return Run.load(out)


def reference(network: str, args: argparse.Namespace) -> Run:
    """Returns a run of this package with four times the sweeps and another seed."""
    chains, warmup, draws, sweeps, bridges = SETTINGS[network]["ours"]
    settings = (chains, warmup, draws, 4 * max(sweeps, 1), bridges)
    return launch(network, "ours", settings, args, seed=args.seed + 1000)


def distance(run: Run, truth: Run | None) -> float:
    """Returns how far the means are apart, in standard errors."""
    if truth is None:
        return float("nan")
    error = np.hypot(mean_error(run.draws), mean_error(truth.draws))
    return float((np.abs(run.draws.mean((0, 1)) - truth.draws.mean((0, 1))) / error).max())


def show(name: str, run: Run, truth: Run | None, own: float) -> float:
    """Prints a row and returns effective draws a second."""
    ess = worst_bulk_ess(run.draws)
    rate = ess / run.seconds
    means = " ".join(f"{m:.3f}+-{s:.3f}" for m, s in zip(*moments(run), strict=True))
    ratio = f"{own / rate:9.1f}" if own else f"{'':9s}"
    cells = f"{run.seconds:9.1f}{ess:9.0f}{rate:9.2f}{worst_rhat(run.draws):9.4f}"
    print(f"{name:12s}{cells}{distance(run, truth):7.1f}{ratio}   {means}", flush=True)
    return rate


def moments(run: Run) -> tuple[list[float], list[float]]:
    """Returns posterior means and standard deviations."""
    return run.draws.mean((0, 1)).tolist(), run.draws.std((0, 1)).tolist()


def parsed() -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--reference", action="store_true", help="also z, several times as long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1800.0)
    return parser.parse_args()


def main() -> None:
    """Prints a table per network."""
    args = parsed()
    if importlib.util.find_spec("ergmx") is None:
        print("left out: the networks are ergmx's, and it is not installed")
        return
    for network in args.networks:
        truth = reference(network, args) if args.reference else None
        heads = ("seconds", "ESS", "ESS/s", "R-hat")
        print(f"\n{network:12s}" + "".join(f"{h:>9s}" for h in heads) + "      z  ours/it")
        own = 0.0
        for method in (m for m in args.methods if m in SETTINGS[network]):
            run = launch(network, method, SETTINGS[network][method], args)
            rate = show(method, run, truth, own)
            own = rate if method == "ours" else own


if __name__ == "__main__":
    main()
