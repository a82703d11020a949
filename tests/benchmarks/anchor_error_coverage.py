"""How often the error that anchors add to a posterior, ``mcse_logz``, covers the truth.

Two posteriors whose log Z is anchored importance sampling, on a grid, beside the grid with the
exact log Z: the coupling of ten 3 x 3 lattices, one anchor of 1000 draws, and a precision of 40
rows, two anchors of 300. Every repeat draws its anchors anew. Printed is the share of repeats in
which a summary is within 1.96 of its stated errors.

    python tests/benchmarks/anchor_error_coverage.py [--repeats 200]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "normalizers"))

from anchor_repeats import PROBLEMS, SUMMARIES, z_of_repeats  # noqa: E402


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=80, help="of the anchors, per error")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore", message="log Z was asked")  # at the ends of the grids
    print(f"{'problem':12s} " + " ".join(f"{name:>6s}" for name in SUMMARIES))
    for name in PROBLEMS:
        torch.manual_seed(args.seed)
        z = z_of_repeats(name, args.repeats, args.replicates)
        shares = (z.abs() < 1.96).double().mean(0).tolist()
        print(f"{name:12s} " + " ".join(f"{share:6.3f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
