"""ArviZ objects from NumPy arrays, for ArviZ 0.x and 1.x alike.

Neither torch nor Pyro nor the rest of the package is imported here, and ArviZ is handed in as a
module: these functions can be used, and are tested, where only NumPy and ArviZ are installed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["build", "by_chain", "conventional_stats", "safe_name", "summary_table"]

Arrays = Mapping[str, NDArray[Any]]
_COLUMNS = ["mean", "sd", "mcse_mean", "ess_bulk", "ess_tail", "r_hat"]


def build(
    az: Any,
    groups: Mapping[str, Arrays],
    *,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Returns ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x) of the non-empty groups.

    Args:
        az: The ``arviz`` module.
        groups: Group name to variables; sampled groups begin with ``(chains, draws)``.
        coords: Dimension to labels.
        dims: Variable to the names of the dimensions after ``(chain, draw)``.
        attrs: Group name to its attributes.

    Raises:
        ValueError: If two names become one because ``/`` is written as a dot, or a variable has the
            name of a dimension.
    """
    data = {group: _safe_names(group, arrays) for group, arrays in groups.items() if arrays}
    labels = {safe_name(name): list(names) for name, names in (dims or {}).items()}
    for group, arrays in data.items():
        _check_dimensions(group, arrays, labels)
    shared: dict[str, Any] = {"coords": dict(coords or {}), "dims": labels, "save_warmup": True}
    described = {group: dict(own) for group, own in (attrs or {}).items() if group in data}
    with _quiet():
        if int(az.__version__.split(".")[0]) >= 1:
            return az.from_dict(data, attrs=described, **shared)
        old_style = {f"{_old_attrs_name(group)}_attrs": own for group, own in described.items()}
        return az.from_dict(**data, **old_style, **shared)


def by_chain(
    what: str, arrays: Mapping[str, NDArray[Any]], num_chains: int, num_samples: int
) -> dict[str, NDArray[Any]]:
    """Gives arrays their ``(chains, draws)`` axes, whether they come flattened or have them.

    Raises:
        ValueError: If the leading axes match neither; nothing is dropped or padded.
    """
    return {
        name: _by_chain(f"{what}[{name!r}]", array, num_chains, num_samples)
        for name, array in arrays.items()
    }


def _by_chain(what: str, array: NDArray[Any], num_chains: int, num_samples: int) -> NDArray[Any]:
    if array.shape[:2] == (num_chains, num_samples):
        return array
    if array.shape[:1] == (num_chains * num_samples,):
        return array.reshape(num_chains, num_samples, *array.shape[1:])
    raise ValueError(
        f"{what} has shape {array.shape}; expected it to begin with ({num_chains}, {num_samples}) "
        f"or with {num_chains * num_samples}, one value per posterior draw"
    )


def conventional_stats(stats: Arrays) -> dict[str, NDArray[Any]]:
    """Adds the second spelling under which ArviZ versions look for saturated trees."""
    spellings = ("reached_max_treedepth", "reached_max_tree_depth")
    present = [stats[name] for name in spellings if name in stats]
    return {**stats, **(dict.fromkeys(spellings, present[0]) if present else {})}


def summary_table(az: Any, draws: Arrays) -> Any:
    """Returns a ``pandas.DataFrame``, one row per scalar.

    Columns: mean, sd, mcse_mean, ess_bulk, ess_tail, r_hat. The last three are ArviZ's
    rank-normalized ones, ``nan`` where they do not exist.

    Raises:
        ValueError: If two names become one because ``/`` is written as a dot.
    """
    safe = _safe_names("posterior", draws)
    numbered = {f"v{i}": np.asarray(x, dtype=np.float64) for i, x in enumerate(safe.values())}
    data = build(az, {"posterior": numbered})  # whose names are those of no dimension
    with _quiet(), np.errstate(all="ignore"):
        table = az.summary(data, kind="all", round_to="none")[_COLUMNS].astype(float)
    names = dict(zip(numbered, safe, strict=True))
    rows = (label.partition("[") for label in table.index)
    table.index = ["".join((names[number], *entry)) for number, *entry in rows]
    return table


def safe_name(name: str) -> str:
    """Returns a name that may stand in a tree of groups."""
    return name.replace("/", ".")


def _safe_names(group: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Writes ``/`` (which Pyro's ``scope`` puts into names and trees of groups forbid) as a dot."""
    safe = {safe_name(name): array for name, array in arrays.items()}
    if len(safe) < len(arrays):
        raise ValueError(f"{group}: names differ only by '/' and '.', rename one: {sorted(arrays)}")
    return safe


def _check_dimensions(group: str, arrays: Arrays, dims: Mapping[str, Sequence[str | None]]) -> None:
    """Raises if a variable has the name of a dimension: ArviZ would drop it for labels."""
    lead = () if group == "observed_data" else ("chain", "draw")
    own = {
        dim
        for name, array in arrays.items()
        for dim in _dimensions(name, array.ndim - len(lead), dims.get(name, ()))
    }
    if lost := sorted(arrays.keys() & {*lead, *own}):
        raise ValueError(
            f"{group}: variables {lost} have names of dimensions there, and ArviZ would take them "
            "for their labels: rename these sites (draws at hand in a dict of arrays), or, unless "
            "it is chain or draw, the dimension by dims="
        )


def _dimensions(name: str, number: int, given: Sequence[str | None]) -> list[str]:
    """The names of a variable's dimensions: those given, by number where they are left out."""
    padded = [*given, *[None] * (number - len(given))]
    return [dim or f"{name}_dim_{i}" for i, dim in enumerate(padded)]


def _old_attrs_name(group: str) -> str:
    """ArviZ 0.x keeps the attributes of ``warmup_x`` under ``x_warmup_attrs``."""
    return f"{group.removeprefix('warmup_')}_warmup" if group.startswith("warmup_") else group


@contextmanager
def _quiet() -> Iterator[None]:
    """Mutes what is no news: shapes known to be right, undefined statistics shown as nan."""
    logger = logging.getLogger("arviz")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="More chains|Found chain dimension")
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
