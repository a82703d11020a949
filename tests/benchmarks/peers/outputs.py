"""What a sampler's script is told and what it writes: draws, seconds and gradients."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass
class Run:
    """One run of one method.

    Args:
        draws: Unconstrained positions, ``(C, n, D)``.
        compile: Seconds of compiling, where they can be told from those of the warm-up.
        warmup: Seconds of the warm-up.
        sampling: Seconds of the draws.
        warmup_gradients: Gradients per chain of the whole warm-up, mean over chains.
        draw_gradients: Gradients per chain and draw, mean over chains.
        step_size: Step size after warm-up, mean over chains.
    """

    draws: np.ndarray
    compile: float
    warmup: float
    sampling: float
    warmup_gradients: float
    draw_gradients: float
    step_size: float

    @property
    def before(self) -> float:
        """Seconds before the first draw."""
        return self.compile + self.warmup

    @property
    def seconds(self) -> float:
        """Seconds from the call to the last draw."""
        return self.before + self.sampling

    @property
    def per_gradient(self) -> float:
        """Seconds per gradient of all chains, compilation aside."""
        gradients = self.warmup_gradients + self.draws.shape[1] * self.draw_gradients
        return (self.warmup + self.sampling) / gradients

    def save(self, path: Path) -> None:
        """Writes the draws to ``path`` and the rest beside it."""
        np.savez(path, draws=self.draws.astype(np.float32))
        rest = {k: float(v) for k, v in asdict(self).items() if k != "draws"}
        path.with_suffix(".json").write_text(json.dumps(rest, indent=1))

    @classmethod
    def load(cls, path: Path) -> Run:
        """Reads what :meth:`save` wrote."""
        rest = json.loads(path.with_suffix(".json").read_text())
        return cls(draws=np.load(path)["draws"], **rest)


def parsed() -> argparse.Namespace:
    """Returns the arguments of a sampler's script, pinned to one core before any thread starts."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("method")
    for name in ("num_chains", "warmup", "draws", "seed"):
        parser.add_argument(name, type=int)
    parser.add_argument("out", type=Path)
    return parser.parse_args()
