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

    python examples/quickstart.py              # one seed, three to four minutes on two cores
    python examples/quickstart.py --seeds 5    # the same for seeds 0 to 4
    python examples/quickstart.py --smoke      # a few seconds, nothing is learned
    python examples/quickstart.py --tune       # how the settings were chosen, about half an hour
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from _quickstart import digits, latent, plane
from _quickstart.figure import DigitsRun, draw_figure
from _quickstart.report import Report, table_cell, verdict
from _quickstart.tune import tune
from torch import Tensor
from tqdm.auto import tqdm

import pyro_ebm as ebm
from pyro_ebm.chains import MMDInterval, median_distance, mmd2_bootstrap, mmd2_difference


def run_digits(seed: int, args: argparse.Namespace, report: Report) -> DigitsRun:
    """Trains the GEBM and its rivals, samples, diagnoses, compares."""
    data, settings = ebm.datasets.digits(), args.settings
    report.heading(f"Digits, seed {seed}")
    gebm = digits.train_gebm(data.train, settings, seed)
    kale = digits.play_game(data.train, settings, settings.rival, seed)
    mmd = digits.train_by_mmd(data.train, settings, seed)
    report(
        f"seconds of training: {gebm.seconds:.0f} (GEBM), {kale.seconds:.0f} (generator alone, "
        f"KALE), {mmd.seconds:.0f} (generator alone, MMD)\n"
    )
    chains = sample_and_diagnose(gebm, seed, args, report)
    laws = {
        "generator": gebm.model.gebm.base,
        "generator alone, KALE": kale.model.gebm.base,
        "generator alone, MMD": mmd.model.gebm.base,
    }
    images = {"training digits": data.train, "GEBM": gebm.model.generate(chains.independent)}
    images |= {name: law.sample((settings.num_draws,)) for name, law in laws.items()}
    discrepancies, gains = compare(images, data.test, median_distance(data.train), report)
    return DigitsRun(gebm, images, data.valid, chains, discrepancies, gains)


def sample_and_diagnose(
    gebm: digits.Trained, seed: int, args: argparse.Namespace, report: Report
) -> latent.Chains:
    """Samples the latent law by NUTS and by many short chains; prints how they mixed and agree."""
    chains = latent.sample(
        gebm.model,
        num_samples=args.nuts_samples,
        warmup_steps=args.nuts_warmup,
        num_independent=args.settings.num_draws,
        seed=seed,
    )
    report(f"NUTS in latent space, {chains.diagnosis}")
    z, count = latent.disagreement(chains, gebm.model)
    agree = "agree" if z < 4.5 else "DISAGREE"
    report(f"latent.sample and NUTS {agree}: the largest |z| of {count} means is {z:.1f}")
    path = args.out / f"digits_seed{seed}.nc"
    latent.save_arviz(chains, gebm.model, path)
    report(f"chains for ArviZ: {path}\n")
    return chains


def compare(
    images: dict[str, Tensor], test: Tensor, bandwidth: Tensor, report: Report
) -> tuple[dict[str, MMDInterval], dict[str, MMDInterval]]:
    """Prints MMD² of every law to the test rows, and the GEBM's gain over each generator."""
    discrepancies, gains, rows = {}, {}, []
    for name, draws in tqdm(images.items(), desc="bootstrap"):
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


def print_gains(gains: dict[int, dict[str, MMDInterval]], report: Report) -> None:
    """Prints 1000 times the gain in MMD² of every seed, and how often its interval excludes 0."""
    report.heading("1000 x gain in MMD² of the GEBM over the generator, all seeds")
    names = list(next(iter(gains.values())))
    rows = [
        (f"seed {seed}", *(table_cell(found[n]) for n in names)) for seed, found in gains.items()
    ]
    above = [sum(found[n].lower > 0 for found in gains.values()) for n in names]
    below = [sum(found[n].upper < 0 for found in gains.values()) for n in names]
    rows.append(("seeds above 0", *(f"{count} of {len(gains)}" for count in above)))
    rows.append(("seeds below 0", *(f"{count} of {len(gains)}" for count in below)))
    report.table(("", *names), rows)


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
    args.nuts_samples, args.nuts_warmup = 800, 300
    args.plane_steps, args.plane_draws = 1500, 8000
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
    # On two cores Pyro draws the chains one after the other, and warns.
    warnings.filterwarnings("ignore", message=r"num_chains=\d+ is more than available_cpu")
    report = Report()
    if args.tune:
        tune(args.settings, report)
        report.save(args.out / "tuning.txt")
        return
    if args.smoke:
        report("smoke run: a few steps of everything, the numbers mean nothing")
    started, gains, figures = time.perf_counter(), {}, []
    for seed in range(args.seed, args.seed + args.seeds):
        run = run_digits(seed, args, report)
        corrected = run_plane(seed, args, report)
        figures.append(args.out / f"quickstart_seed{seed}.png")
        draw_figure(figures[-1], run, corrected)
        gains[seed] = run.gains | {found.problem.name: found.gain for found in corrected}
    if args.seeds > 1:
        print_gains(gains, report)
    report(f"\n{time.perf_counter() - started:.0f} s for {args.seeds} seed(s)")
    report(f"figure: {', '.join(map(str, figures))}")
    report(f"report: {args.out / 'report.txt'}")
    report.save(args.out / "report.txt")


if __name__ == "__main__":
    main()
