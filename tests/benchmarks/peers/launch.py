"""Runs one method in a process of its own, within a limit of time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from peers.outputs import Run

FOLDER = Path(__file__).resolve().parents[1]
ROOT = FOLDER.parents[1]
NEEDS = {"pyro_nuts": "pyro", "ebmkit_nuts": "ebm"}


def of_jax(method: str) -> bool:
    """Whether a method runs in the JAX environment."""
    return method.startswith(("numpyro", "blackjax"))


def jax_python() -> Path:
    """Returns the Python that has JAX, NumPyro, BlackJAX and Inference Gym."""
    default = ROOT / ".venv-bench-jax" / "bin" / "python"
    return Path(os.environ.get("BENCH_JAX_PYTHON", default))


@cache
def jax_folder(module: str) -> str:
    """Returns where a module of the JAX environment is installed, or nothing."""
    code = f"import importlib.util as u; s = u.find_spec({module!r}); print(s and s.origin or '')"
    if not jax_python().exists():
        return ""
    done = subprocess.run([jax_python(), "-c", code], capture_output=True, text=True)
    origin = done.stdout.strip()
    return str(Path(origin).parent) if origin else ""


def is_installed(method: str) -> bool:
    """Whether the library of a method is there."""
    if of_jax(method):
        return bool(jax_folder(method.split("_")[0]))
    return method not in NEEDS or importlib.util.find_spec(NEEDS[method]) is not None


def available(methods: list[str]) -> list[str]:
    """Returns those that can be run here; says which cannot."""
    missing = [method for method in methods if not is_installed(method)]
    if missing:
        print(f"left out, not installed (see BENCH_JAX_PYTHON): {', '.join(missing)}")
    return [method for method in methods if method not in missing]


def set_environment(weights: Path | None) -> None:
    """Tells the processes where the weights and Inference Gym are."""
    if weights is not None:
        os.environ["BENCH_WEIGHTS"] = str(weights.resolve())
    if "BENCH_GYM" not in os.environ and jax_folder("inference_gym"):
        os.environ["BENCH_GYM"] = jax_folder("inference_gym")


def launch(
    target: str,
    method: str,
    sizes: tuple[int, int, int],
    *,
    seed: int = 0,
    limit: float = 300.0,
) -> Run | str:
    """Runs a method.

    Args:
        target: Name of the target.
        method: Name of the method.
        sizes: Chains, warm-up and draws.
        seed: Of the start and of the method.
        limit: Seconds after which it is ended.

    Returns:
        The run, or what to print instead of it.
    """
    module = "peers.jax_samplers" if of_jax(method) else "peers.torch_samplers"
    python = jax_python() if of_jax(method) else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        command = [python, "-m", module, target, method, *map(str, (*sizes, seed)), out]
        try:
            done = subprocess.run(
                command, cwd=FOLDER, timeout=limit, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return f"> {limit:.0f} s"
        if done.returncode or not out.exists():
            reason = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
            print(f"  {method} on {target}: {reason[:150]}", flush=True)
            return "failed"
        return Run.load(out)
