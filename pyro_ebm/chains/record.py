"""One record for the draws of every sampler: Pyro's own, ours, or plain arrays.

A record holds NumPy arrays whose first two axes are ``(chains, draws)``, on the constrained space,
the statistics of every transition under ArviZ's names, and what a reader of the draws must know
about their making. Nothing here needs torch: a saved record can be read where torch is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Record", "as_record"]

Arrays = dict[str, NDArray[Any]]
_GROUPS = ("draws", "sample_stats", "warmup_draws", "warmup_stats")


@dataclass(eq=False)
class Record:
    """Draws, statistics and their provenance.

    Args:
        draws: Site name to draws of shape ``(chains, draws) + event_shape``; tensors are converted.
        sample_stats: Statistic to values of shape ``(chains, draws)``: ``lp`` (minus the potential
            on the unconstrained space, nats), ``energy`` (the Hamiltonian, never the model's own
            energy), ``diverging``, ``tree_depth``, ``n_steps``, ``acceptance_rate``, ``step_size``,
            ``energy_error``, ``reached_max_treedepth``; whichever the sampler has.
        warmup_draws: Draws of the adaptation, if kept, with their own number of draws.
        warmup_stats: Statistics of the adaptation, if kept.
        sampler: Name of the kernel.
        adjusted: Whether a Metropolis step (or exactness) makes the target invariant. ``False`` for
            unadjusted Langevin chains and for exchange without exact draws; ``attrs["bias"]`` says
            what biases the draws then.
        inverse_temperature: Set if the energy was multiplied by it: not 1 is not the model.
        approximate: Whether the draws come from chains known to be too short.
        seconds: Wall-clock time of the run.
        attrs: Further metadata that JSON can hold; ``"bias"`` and ``"doubts"`` are sentences of
            the sampler's own.

    Raises:
        ValueError: If arrays disagree on the numbers of chains or draws, or have under two axes.

    Example:
        >>> import numpy as np
        >>> record = Record({"x": np.zeros((4, 100, 2))}, sampler="ULA", adjusted=False)
        >>> record.num_chains, record.num_samples
        (4, 100)
    """

    draws: Arrays
    sample_stats: Arrays = field(default_factory=dict)
    warmup_draws: Arrays = field(default_factory=dict)
    warmup_stats: Arrays = field(default_factory=dict)
    sampler: str = "unknown"
    adjusted: bool = True
    inverse_temperature: float | None = None
    approximate: bool = False
    seconds: float | None = None
    attrs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in _GROUPS:
            setattr(self, group, {k: to_numpy(v) for k, v in getattr(self, group).items()})
        if not self.draws:
            raise ValueError("Record: draws is empty, expected at least one site")
        _check_shapes("draws and sample_stats", {**self.sample_stats, **self.draws})
        _check_shapes("warmup_draws and warmup_stats", {**self.warmup_stats, **self.warmup_draws})

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return next(iter(self.draws.values())).shape[0]

    @property
    def num_samples(self) -> int:
        """Number of kept draws of each chain."""
        return next(iter(self.draws.values())).shape[1]

    @classmethod
    def from_mcmc(cls, mcmc: Any) -> Record:
        """Reads a finished run of :class:`pyro.infer.MCMC`, with any kernel.

        A recording kernel brings all its statistics; a stock one has only the draws at which it
        diverged, and Pyro's acceptance rate of every chain (for NUTS the share of transitions that
        moved), which goes to ``attrs["pyro_acceptance_rate"]``.

        Raises:
            ValueError: If ``run`` has not been called.
            TypeError: If the driver keeps no draws (``StreamingMCMC``).
        """
        if not hasattr(mcmc, "get_samples"):
            raise TypeError(f"{type(mcmc).__name__} keeps no draws; run pyro.infer.MCMC instead")
        # By chain number; the public dict of "chain 0", "chain 10", "chain 2" invites a wrong sort.
        chains: list[dict[str, Any] | None] = mcmc._diagnostics
        if any(chain is None for chain in chains):
            raise ValueError("this MCMC has no draws yet: call run() first")
        finished = [chain for chain in chains if chain is not None]
        draws = {k: to_numpy(v) for k, v in mcmc.get_samples(group_by_chain=True).items()}
        kernel = mcmc.kernel
        return cls(
            draws,
            sample_stats=_sample_stats(finished, mcmc.num_samples),
            warmup_stats=_stacked(finished, "warmup_stats"),
            sampler=type(kernel).__name__,
            adjusted=_is_adjusted(finished, kernel),
            inverse_temperature=getattr(kernel, "inverse_temperature", None),
            approximate=bool(getattr(kernel, "approximate", False)),
            attrs={**_reservations(finished, kernel), **_acceptance_by_chain(finished)},
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Writes everything to one ``.npz`` file at exactly ``path``."""
        arrays = {f"{group}/{k}": v for group in _GROUPS for k, v in getattr(self, group).items()}
        with open(path, "wb") as file:
            np.savez_compressed(file, __metadata__=np.array(json.dumps(self.metadata())), **arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Record:
        """Reads what :meth:`save` wrote; no pickled objects are accepted."""
        groups: dict[str, Arrays] = {group: {} for group in _GROUPS}
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file["__metadata__"]))
            for key in [key for key in file.files if key != "__metadata__"]:
                group, name = key.split("/", 1)
                groups[group][name] = file[key]
        draws, stats, warmup_draws, warmup_stats = (groups[group] for group in _GROUPS)
        return cls(draws, stats, warmup_draws, warmup_stats, **metadata)

    def metadata(self) -> dict[str, Any]:
        """Returns all that is not an array."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _GROUPS}


def as_record(source: Any) -> Record:
    """Returns the record of a finished run, or makes one of ``(chains, draws, ...)`` arrays.

    Args:
        source: A :class:`Record`, an object with one as ``record``, a finished
            :class:`pyro.infer.MCMC`, or a mapping of names to arrays.

    Raises:
        TypeError: If ``source`` is none of these.
    """
    if isinstance(source, Record):
        return source
    if isinstance(source, Mapping):
        return Record(dict(source))
    record = getattr(source, "record", None)
    if isinstance(record, Record):
        return record
    if hasattr(source, "kernel") and hasattr(source, "num_chains"):
        return Record.from_mcmc(source)
    raise TypeError(
        "expected a finished MCMC, a Record or a dict of (chains, draws, ...) arrays, "
        f"got {type(source).__name__}"
    )


def to_numpy(values: Any) -> NDArray[Any]:
    """Returns an array, from a tensor on any device if need be."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _check_shapes(what: str, arrays: Arrays) -> None:
    shapes = {name: array.shape[:2] for name, array in arrays.items()}
    if any(len(shape) < 2 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        raise ValueError(
            f"Record: {what} must all begin with the same (chains, draws), got {shapes}. For one "
            "chain add the axis: x[None]"
        )


def _sample_stats(chains: list[dict[str, Any]], num_samples: int) -> Arrays:
    recorded = _stacked(chains, "sample_stats")
    if recorded or not all("divergences" in chain for chain in chains):
        return recorded
    diverging = np.zeros((len(chains), num_samples), dtype=bool)
    for flags, chain in zip(diverging, chains, strict=True):
        flags[chain["divergences"]] = True
    return {"diverging": diverging}


def _stacked(chains: list[dict[str, Any]], group: str) -> Arrays:
    per_chain = [chain.get(group, {}) for chain in chains]
    return {name: np.stack([stats[name] for stats in per_chain]) for name in per_chain[0]}


def _is_adjusted(chains: list[dict[str, Any]], kernel: Any) -> bool:
    """As the chains say, which may have run in processes of their own, else as the kernel does."""
    return all(chain.get("adjusted", getattr(kernel, "adjusted", True)) for chain in chains)


def _reservations(chains: list[dict[str, Any]], kernel: Any) -> dict[str, Any]:
    """What speaks against the draws of a kernel, from the chains likewise."""
    found = {}
    bias = chains[0].get("bias", getattr(kernel, "bias", None))
    if bias is not None and not _is_adjusted(chains, kernel):
        found["bias"] = bias
    if doubts := list(dict.fromkeys(d for chain in chains for d in chain.get("doubts", ()))):
        found["doubts"] = "; ".join(doubts)
    return found


def _acceptance_by_chain(chains: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [float(chain["acceptance rate"]) for chain in chains if "acceptance rate" in chain]
    return {"pyro_acceptance_rate": rates} if rates else {}
