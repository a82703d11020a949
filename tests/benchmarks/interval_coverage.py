"""How often the stated 95 % intervals of log Z cover it, against ESS: one table.

    python tests/benchmarks/interval_coverage.py --repeats 200

A row is a problem, an estimator and a size: how many of the runs stated an interval at all (those
below ESS 100 and those with another doubt do not), their median ESS, the share of intervals that
cover, and the Monte Carlo error of that share.
"""

import argparse
import sys
import time
from pathlib import Path

import pyro
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "normalizers"))

from interval_problems import ESTIMATORS, coverage, pairs  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--problem", default="", help="only problems with this in their name")
    parser.add_argument("--estimator", default="", help="only estimators with this in their name")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print(f"{'problem':14s} {'estimator':16s} {'size':>6s} {'stated':>9s} {'ESS':>8s}  coverage")
    for problem, estimator in pairs():
        if options.problem not in problem or options.estimator not in estimator:
            continue
        for size in ESTIMATORS[estimator][1]:
            pyro.set_rng_seed(20_240)
            started = time.perf_counter()
            seen = coverage(problem, estimator, size, options.repeats)
            stated = f"{seen.num_stated}/{seen.num_runs}"
            took = time.perf_counter() - started
            print(
                f"{problem:14s} {estimator:16s} {size:6d} {stated:>9s} {seen.ess:8.0f}"
                f"  {seen.share:.3f} ± {seen.error:.3f}  ({took:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
