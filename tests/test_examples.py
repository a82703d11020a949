"""Every example runs from a shell with ``--smoke`` and leaves what it promises in ``--out``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import arviz as az
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
    # Two standard errors of the pseudo-likelihood: the posterior is near, and not the same.
    "karate_club.py": (r"^pseudo-likelihood: (\S+) \+-[\s\S]*^edges +(\S+)", 0.43),
    "ising_field.py": (r"^ 1100 HMC through log Z +(\S+) +(\S+)", 0.005),
    "maximum_entropy.py": (r"^member, member later +(\S+) +\S+ +(\S+)", 0.015),
    "missing_log_z.py": (r"with log Z\(theta\) +(\S+).*\n +the posterior: .*\) +(\S+) ", 0.3),
}
# Those that leave draws as NetCDF, as ``draws.nc``.
SAVED = {
    "conway_maxwell_poisson.py",
    "florentine_families.py",
    "horse_kicks.py",
    "ising_field.py",
    "karate_club.py",
    "latent_energy_digits.py",
    "maximum_entropy.py",
    "takeover_bids.py",
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
    check_answers(name, run.stdout)
    if name in SAVED:
        check_saved(tmp_path / "draws.nc")


def check_answers(name, printed):
    """Asserts that what a script prints is what it prints beside it."""
    if name in ANSWERS:
        check_answer(printed, *ANSWERS[name])
    if name in TABLES:
        read, number = TABLES[name]
        rows = list(read(printed))
        assert len(rows) == number, printed
        far = [row for row in rows if abs(row[0] - row[1]) > 4.5 * row[2]]
        assert not far, far


def rates_of_corps(printed):
    """Means by HMC and by exchange, and the error of their difference."""
    pattern = r"^(?:nu|mean|spread|corps \w+) +(\S+) +(\S+) +\S+ +(\S+) +(\S+) +(\S+) +\S+ +(\S+)$"
    for row in re.findall(pattern, printed, re.MULTILINE):
        ours, sd, size, known, other_sd, other_size = map(float, row)
        yield ours, known, (sd**2 / size + other_sd**2 / other_size) ** 0.5


def weights_of_digits(printed):
    """Means by HMC and with latents summed out, and the error of their difference."""
    pattern = r"^\(.*\) +(\S+) +\S+ +\S+ +\S+ +(\S+) +(\S+) \| +(\S+) +\S+ +(\S+)$"
    for row in re.findall(pattern, printed, re.MULTILINE):
        ours, error, of_log_z, known, other = map(float, row)
        yield ours, known, (error**2 + of_log_z**2 + other**2) ** 0.5


# Two ways to one posterior: what reads a printed table of them, and its number of rows. At 4.5
# errors a right table is refused once in 10 000 runs.
TABLES = {
    "horse_kicks.py": (rates_of_corps, 17),
    "latent_energy_digits.py": (weights_of_digits, 16),
}


def check_saved(path):
    """Asserts that draws come with what was known of them."""
    data = az.from_netcdf(str(path))
    posterior = data["posterior"]
    assert posterior.sizes["chain"] > 1
    assert all(np.isfinite(values).all() for values in posterior.data_vars.values())
    assert posterior.attrs["inference_library"] == "pyro_ebm"
    assert posterior.attrs["adjusted"] or "exchange_verdict" in posterior.attrs
    assert "step_size" in data["sample_stats"]


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


def test_a_wrong_table_is_found():
    """A mean five errors off, and a row that is missing."""
    row = "corps G          {:.3f}   0.200   1.002    1000   -0.340   0.200   1.002    1000\n"
    table = row.format(-0.34) * 17
    check_answers("horse_kicks.py", table)
    with pytest.raises(AssertionError, match="-0.295"):
        check_answers("horse_kicks.py", row.format(-0.295) + row.format(-0.34) * 16)
    with pytest.raises(AssertionError):
        check_answers("horse_kicks.py", row.format(-0.34) * 16)
    row = "(-1.8, -0.6)   {:.3f}  1.008  1.102    56  0.100     0.100 |  -1.700  1.140  0.100\n"
    check_answers("latent_energy_digits.py", row.format(-1.7) * 16)
    with pytest.raises(AssertionError, match="-0.9"):
        check_answers("latent_energy_digits.py", row.format(-1.7) * 15 + row.format(-0.9))


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
