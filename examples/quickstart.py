r"""Quickstart: a generalized energy-based model (GEBM) of handwritten digits, from data to verdict.

A generator G turns noise into images, an energy E reweights them:
:math:`dQ(x) = e^{-E(x)} d(G_\# \eta)(x) / Z`. Both are learned by KALE inside a Pyro model. The
script then

* samples the GEBM in latent space with Pyro's NUTS, four chains, and prints rank R-hat, effective
  sample sizes, BFMI and divergences; the chains are written for ArviZ;
* compares it with its own generator and with generators alone that had the same compute, by MMD² on
  test rows that nothing else has seen, with bootstrap intervals, and says so where nothing is
  gained;
* shows the case the method is made for, right support and wrong mass, on a ring and 25 Gaussians.

Run it from anywhere; it needs scikit-learn for the digits::

    python examples/quickstart.py              # one seed, about three minutes on two cores
    python examples/quickstart.py --seeds 5    # the same for seeds 0 to 4
    python examples/quickstart.py --smoke      # a few seconds, nothing is learned
    python examples/quickstart.py --tune       # how the settings were chosen, about half an hour
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _quickstart import digits, latent, plane
from _quickstart.figure import draw_figure
from _quickstart.report import Report, table_cell, verdict
from _quickstart.tune import tune
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.chains import MMDInterval, median_distance, mmd2_bootstrap, mmd2_difference


@dataclass
class DigitsRun:
    """One seed of part 1."""

    gebm: digits.Trained
    images: dict[str, Tensor]
    chains: latent.Chains
    discrepancies: dict[str, MMDInterval]
    gains: dict[str, MMDInterval]


def run_digits(seed: int, args: argparse.Namespace, report: Report) -> DigitsRun:
    """Trains the GEBM and its rivals, samples, diagnoses, compares."""
    data, settings = ebm.datasets.digits(), args.settings
    bandwidth = float(median_distance(data.train))
    report.heading(f"Digits, seed {seed}")
    gebm = digits.train_gebm(data.train, settings, seed)
    kale = digits.train_generator_by_kale(data.train, settings, seed)
    mmd = digits.train_generator_by_mmd(data.train, settings, seed)
    report(
        f"training took {gebm.seconds:.0f} s (GEBM), {kale.seconds:.0f} s (rival by KALE), "
        f"{mmd.seconds:.0f} s (rival by MMD)"
    )
    chains = sample_and_diagnose(gebm, seed, args, report)
    images = {"data": data.train, **draw_images(gebm, kale, mmd, settings.num_draws)}
    discrepancies, gains = compare(images, data.test, bandwidth, report)
    return DigitsRun(gebm, images, chains, discrepancies, gains)


def sample_and_diagnose(
    gebm: digits.Trained, seed: int, args: argparse.Namespace, report: Report
) -> latent.Chains:
    """Runs NUTS on the latent law, prints the diagnosis and writes the ArviZ file."""
    chains = latent.run_nuts(
        gebm.model, num_samples=args.nuts_samples, warmup_steps=args.nuts_warmup, seed=seed
    )
    report(f"\nlatent posterior by NUTS: {chains.diagnosis}")
    path = args.out / f"digits_seed{seed}.nc"
    latent.save_arviz(chains, gebm.model, path)
    report(f"chains for ArviZ: {path}")
    quick = gebm.model.gebm.latent.sample((args.settings.num_draws,))
    z, count = latent.disagreement(chains, gebm.model, quick)
    agree = "agree" if z < 4.5 else "DISAGREE"
    report(f"latent.sample and NUTS {agree}: largest |z| of {count} means is {z:.1f}\n")
    return chains


@torch.no_grad()
def draw_images(
    gebm: digits.Trained, kale: digits.Trained, mmd: digits.Trained, num: int
) -> dict[str, Tensor]:
    """Draws the same number of images from every law."""
    return {
        "generator": gebm.model.gebm.base.sample((num,)),
        "GEBM": gebm.model.gebm.sample((num,)),
        "generator alone, KALE": kale.model.gebm.base.sample((num,)),
        "generator alone, MMD": mmd.model.gebm.base.sample((num,)),
    }


def compare(
    images: dict[str, Tensor], test: Tensor, bandwidth: float, report: Report
) -> tuple[dict[str, MMDInterval], dict[str, MMDInterval]]:
    """Prints MMD² of every law to the test rows, and the GEBM's gain over each rival."""
    discrepancies, gains, rows = {}, {}, []
    for name, draws in images.items():
        discrepancies[name] = mmd2_bootstrap(draws, test, bandwidth=bandwidth)
        row = [name, table_cell(discrepancies[name]), "", ""]
        if name.startswith("generator"):
            gains[name] = mmd2_difference(images["GEBM"], draws, test, bandwidth=bandwidth)
            row[2:] = [table_cell(gains[name]), verdict(gains[name])]
        rows.append(row)
    report.table(("1000 x", "MMD² to test rows", "gain of the GEBM", "the GEBM is"), rows)
    return discrepancies, gains


def run_plane(seed: int, args: argparse.Namespace, report: Report) -> list[plane.Corrected]:
    """Corrects two generators of right support and wrong mass."""
    report.heading(f"Right support, wrong mass, seed {seed}")
    found = [
        plane.correct(problem, seed=seed, num_steps=args.plane_steps, num_draws=args.plane_draws)
        for problem in plane.problems()
    ]
    rows = [
        (
            c.problem.name,
            table_cell(c.gain),
            verdict(c.gain),
            f"{c.worst_mass(c.generator_mass):.4f}",
            f"{c.worst_mass(c.gebm_mass):.4f}",
            f"{c.sampling_error:.4f}",
        )
        for c in found
    ]
    header = ("1000 x", "gain in MMD²", "the GEBM is", "worst mode: generator", "GEBM", "std. err.")
    report.table(header, rows)
    return found


def parse_arguments() -> argparse.Namespace:
    """Reads the command line and fixes the sizes of the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--out", type=Path, default=Path("results/quickstart"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, nothing is learned")
    parser.add_argument("--tune", action="store_true", help="try settings on the validation rows")
    args = parser.parse_args()
    args.settings = digits.Settings()
    args.nuts_samples, args.nuts_warmup = 500, 300
    args.plane_steps, args.plane_draws = 800, 8000
    if args.smoke:
        args.settings = digits.Settings(
            game=digits.Game(num_steps=30),
            energy=digits.EnergyPhase(num_steps=10),
            rival=digits.Game(num_steps=30),
            mmd=digits.MMDTraining(num_steps=10),
            num_draws=300,
        )
        args.nuts_samples, args.nuts_warmup = 20, 20
        args.plane_steps, args.plane_draws = 20, 300
    return args


def main() -> None:
    """Runs every seed, then prints the gains side by side and where the files are."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small networks: a second thread mostly waits
    started, report = time.perf_counter(), Report()
    if args.tune:
        tune(args.settings, report)
        report.save(args.out / "tuning.txt")
        return
    for seed in range(args.seed, args.seed + args.seeds):
        run = run_digits(seed, args, report)
        corrected = run_plane(seed, args, report)
        path = args.out / f"quickstart_seed{seed}.png"
        draw_figure(path, run.images, run.gebm, run.chains, run.discrepancies, corrected)
        report(f"figure: {path}")
    report(f"took {time.perf_counter() - started:.0f} s")
    report.save(args.out / "report.txt")


if __name__ == "__main__":
    main()
