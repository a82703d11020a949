"""Every example runs from a shell with ``--smoke`` and leaves what it promises in ``--out``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES_FOLDER = ROOT / "examples"
FIGURES = {".png", ".pdf", ".svg"}
TIMEOUT = 180  # seconds; the smoke runs are meant to take a few

# Every script of the folder, and whether it draws a figure.
EXAMPLES = {
    "conway_maxwell_poisson.py": True,
    "quickstart.py": True,
    "energy_factors.py": True,
    "nce_two_moons.py": True,
    "missing_log_z.py": True,
    "horse_kicks.py": True,
    "ising_field.py": True,
    "maximum_entropy.py": True,
    "takeover_bids.py": True,
    "latent_energy_digits.py": True,
    "florentine_families.py": True,
    "karate_club.py": True,
    "conditional_regression.py": True,
}
# Those of the folder reproductions.
REPRODUCTIONS = {
    "contrastive_equalities.py",
    "discrete_toys.py",
    "energy_discrepancy_identities.py",
    "gaussians_25.py",
    "ising_couplings.py",
    "kale_flow_rings.py",
    "mode_weights.py",
    "nce_log_normalizer.py",
    "nltcs_likelihoods.py",
}
# Where an answer is printed beside ours: a pattern of both, and how far they may be apart. Means of
# the chains of smoke runs err by .05 (missing_log_z), .002 (maximum_entropy), .0008 (ising_field).
ANSWERS = {
    "conway_maxwell_poisson.py": (r"^log-likelihood +(\S+) +(\S+)", 1e-3),
    "florentine_families.py": (r"^edges of edges, wealth +(\S+) +(\S+)", 1e-4),
    "ising_field.py": (r"^ 1100 HMC through log Z +(\S+) +(\S+)", 0.005),
    "maximum_entropy.py": (r"^member, member later +(\S+) +\S+ +(\S+)", 0.015),
    "missing_log_z.py": (r"with log Z\(theta\) +(\S+).*\n +the posterior: .*\) +(\S+) ", 0.3),
}
LONG = {
    "florentine_families.py",
    "ising_field.py",
    "karate_club.py",
    "latent_energy_digits.py",
    "takeover_bids.py",
}
SCRIPTS = [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in EXAMPLES]


def unlisted(table: dict[str, bool], folder: Path) -> set[str]:
    """Returns the names that are in the table or in the folder, but not in both."""
    return set(table) ^ {path.name for path in folder.glob("*.py")}


def run_example(script: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user would, in another folder, with warnings shown and no screen."""
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    environment = {
        **os.environ,
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }
    return subprocess.run(
        [sys.executable, str(script), "--smoke", "--out", str(out), *options],
        cwd=out,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def data_for(name: str, folder: Path) -> tuple[str, ...]:
    """Writes data where a script brings none of its own, and returns the options that name it."""
    if name == "nltcs_likelihoods.py":
        bits = np.random.default_rng(0).integers(0, 2, (3, 200, 16), dtype=np.uint8)
        np.savez(folder / "bits.npz", train=bits[0], valid=bits[1], test=bits[2])
        return "--data", str(folder / "bits.npz")
    if name == "takeover_bids.py":
        write_bids(folder / "bids.csv")
        return "--data", str(folder / "bids.csv")
    return ()


def write_bids(path: Path) -> None:
    """Writes a table of the columns of Ecdat::Bids: counts that hang on one of them."""
    rng, num = np.random.default_rng(0), 126
    columns = {
        name: rng.integers(0, 2, num).astype(float)
        for name in ("leglrest", "rearest", "finrest", "whtknght", "regulatn")
    }
    columns |= {"bidprem": rng.uniform(0.9, 2, num), "insthold": rng.uniform(0, 0.9, num)}
    columns |= {"size": rng.gamma(0.4, 3.0, num)}
    columns["numbids"] = rng.binomial(6, 0.2 + 0.2 * columns["whtknght"])
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines))


def test_table_lists_exactly_the_examples():
    assert unlisted(EXAMPLES, EXAMPLES_FOLDER) == set()


def test_a_forgotten_and_a_missing_example_are_found(tmp_path):
    (tmp_path / "here.py").touch()
    (tmp_path / "forgotten.py").touch()
    assert unlisted({"here.py": False, "gone.py": False}, tmp_path) == {"forgotten.py", "gone.py"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name, tmp_path):
    run = run_example(EXAMPLES_FOLDER / name, tmp_path, *data_for(name, tmp_path))
    assert run.returncode == 0, run.stderr[-4000:]
    assert "Traceback" not in run.stderr
    assert run.stdout.strip()
    figures = [path for path in tmp_path.rglob("*") if path.suffix in FIGURES]
    assert bool(figures) >= EXAMPLES[name]
    assert all(path.stat().st_size > 1000 for path in figures)
    if name in ANSWERS:
        check_answer(run.stdout, *ANSWERS[name])


def check_answer(printed, pattern, tolerance):
    """Asserts that the two numbers that a pattern finds agree."""
    found = re.search(pattern, printed, re.MULTILINE)
    assert found is not None, printed
    ours, known = map(float, found.groups())
    assert abs(ours - known) < tolerance, found[0]


def test_a_wrong_answer_is_found():
    printed = "a       here  published\nlog-likelihood   -18.6449   -18.6349\nb"
    pattern, tolerance = ANSWERS["conway_maxwell_poisson.py"]
    check_answer(printed, pattern, 0.02)
    with pytest.raises(AssertionError, match="log-likelihood +-18.6449"):
        check_answer(printed, pattern, tolerance)
    with pytest.raises(AssertionError):
        check_answer("nothing", pattern, tolerance)


def test_table_lists_exactly_the_reproductions():
    folder = EXAMPLES_FOLDER / "reproductions"
    assert {path.name for path in folder.glob("*.py")} == REPRODUCTIONS


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REPRODUCTIONS))
def test_reproduction_runs(name, tmp_path):
    folder = EXAMPLES_FOLDER / "reproductions"
    run = run_example(folder / name, tmp_path, *data_for(name, tmp_path))
    assert run.returncode == 0, run.stderr[-4000:]
    assert "Traceback" not in run.stderr
    assert run.stdout.strip()
