"""Saving a fit in progress and taking it up again, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyro
import torch

from pyro_ebm.infer.training.run_settings import DEFAULT
from pyro_ebm.infer.training.run_state import HasState, restore, state_of


class Run(HasState, Protocol):
    """A fit in progress, as far as it is saved."""

    settings: dict[str, Any]
    batches: Any
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    stopping: Any
    groups: list[list[str]]

    def materialize(self) -> None:
        """Runs the model once so that every parameter exists."""

    def regroup(self, groups: list[list[str]]) -> None:
        """Makes the optimizer anew for these groups of parameters."""


def save_checkpoint(path: Path, run: Run) -> None:
    """Writes parameters, optimizer, schedules, objective, curves and random state.

    The old file survives a failure.
    """
    result = run.result
    state: dict[str, Any] = {
        **state_of(run),
        "groups": run.groups,
        "optimizer": run.optimizer.state_dict() if run.optimizer else None,
        "scheduler": run.scheduler.state_dict() if run.scheduler else None,
        "stopping": run.stopping.state_dict() if run.stopping else None,
        "curves": {name: getattr(result, name) for name in _CURVES},
        "settings": run.settings,
        "num_rows": run.batches.num_rows,
        "rows_left": run.batches.rows_left,
        "rng": _rng_state(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(_builtin(state), partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, run: Run) -> None:
    """Restores what :func:`save_checkpoint` wrote.

    The model is run once so that every parameter exists; values are then copied in place.

    Raises:
        ValueError: If the file is no checkpoint, or its parameters, its number of rows or its
            settings are not those of this fit.
    """
    state = _read(path)
    _check_settings(path, state["settings"], run.settings)
    if state["num_rows"] != run.batches.num_rows:
        raise ValueError(
            f"{path} is a checkpoint of a fit to {state['num_rows']} rows, and data have "
            f"{run.batches.num_rows}: losses and epochs would not continue. Delete it to start anew"
        )
    run.materialize()
    saved = state["parameters"]
    if saved.keys() != run.parameters.keys():
        differ = sorted(saved.keys() ^ run.parameters.keys())
        raise ValueError(f"{path} is a checkpoint of another model: {differ} are on one side only")
    restore(state, run)
    for name, curve in state["curves"].items():
        setattr(run.result, name, curve)
    if state["optimizer"] is not None:
        run.regroup(state["groups"])
        assert run.optimizer is not None
        run.optimizer.load_state_dict(state["optimizer"])
    _load_schedules(state, run)
    run.batches.rows_left = state["rows_left"]
    _set_rng_state(state["rng"])


_CURVES = (
    "losses",
    "diagnostics",
    "diagnostic_steps",
    "validation",
    "num_steps",
    "diverged",
)


def _builtin(state: Any) -> Any:
    """Numbers of NumPy as Python's, wherever they stand: a safe load accepts no others."""
    if isinstance(state, dict):
        return {key: _builtin(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)) and type(state) in (list, tuple):
        return type(state)(map(_builtin, state))
    return state.item() if isinstance(state, np.generic) else state


def _check_settings(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    for name in {**saved, **own}:
        was, now = saved.get(name, DEFAULT), own.get(name, DEFAULT)
        if was != now:
            raise ValueError(
                f"{path} is a checkpoint of a fit with {name} = {was!r}, and this one has {now!r}: "
                "a run goes on as it began. Delete the file to start anew"
            )


def _load_schedules(state: dict[str, Any], run: Run) -> None:
    """Takes up learning-rate schedule and early stopping where both runs have them."""
    if run.scheduler is not None and state["scheduler"] is not None:
        run.scheduler.load_state_dict(state["scheduler"])
    if run.stopping is not None and state["stopping"] is not None:
        run.stopping.load_state_dict(state["stopping"])


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(
            path, weights_only=True, map_location=None if torch.cuda.is_available() else "cpu"
        )
    except OSError:  # of a file that may be well and cannot be read here
        raise
    except Exception as error:  # whatever a file that is no checkpoint does to the reader
        raise ValueError(
            f"{path} is not a checkpoint of fit, or is damaged; delete it to start anew"
        ) from error
    return state


def _rng_state() -> dict[str, Any]:
    """The generators' states without NumPy arrays, which only an unsafe load would accept.

    Those of CUDA devices are included once CUDA is in use.
    """
    state = pyro.util.get_rng_state()
    kind, words, *rest = state["numpy"]
    of_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = (kind, torch.as_tensor(words.astype("int64")), *rest)
    return {**state, "numpy": numpy, "cuda": of_devices}


def _set_rng_state(state: dict[str, Any]) -> None:
    kind, words, *rest = state["numpy"]
    words = words.numpy().astype("uint32")
    pyro.util.set_rng_state({**state, "numpy": (kind, words, *rest)})
    if torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all(state.get("cuda", [])[: torch.cuda.device_count()])
