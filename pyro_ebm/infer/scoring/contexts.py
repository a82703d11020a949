"""Contexts that do not show by comparing the rows of one step: one row, or one context for all.

A loop over groups calls the model with the data of a group and a number that belongs to it, or with
a tensor that holds this number once for each row. If the energy depends on that number, so does log
Z, though no two rows of a step differ in it. It shows when it changes: then the model is run on the
earlier value, too, and the energies are compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.infer.scoring.arguments import named
from pyro_ebm.infer.scoring.conditional import (
    check_arguments,
    needs_arguments,
    refuse,
    warn_unchecked,
)
from pyro_ebm.ops.module_calls import buffers_restored
from pyro_ebm.ops.powers_of_two import is_power_of_two
from pyro_ebm.ops.same_values import same_values
from pyro_ebm.poutine.aside import aside
from pyro_ebm.poutine.paired_runs import without_value_checks


class ContextChecks:
    """What an objective remembers of the calls of a model, site by site."""

    def __init__(self) -> None:
        self._seen_alone: set[str] = set()
        self._first: dict[str, dict[str, SharedArguments]] = defaultdict(dict)

    def check(
        self,
        name: str,
        p: EnergyDistribution,
        x: Tensor,
        call: tuple[Callable[..., Any], Any, Any],
        values: Callable[[], Any],
        who: str,
    ) -> None:
        """Raises ``ConditionalEnergyError`` if the energy of a site depends on a context.

        Args:
            name: The site, of an objective with one log Z for all rows.
            p: Its law.
            x: Its data.
            call: The model, its arguments and its keyword arguments.
            values: Returns the values of the model's latents.
            who: The objective.
        """
        if p.conditional is False:
            return
        model, args, kwargs = call
        if name not in self._seen_alone and needs_arguments(p, x):
            self._seen_alone.add(name)
            check_arguments(name, model, args, kwargs, values(), who)
        num_rows = x.shape[0] if x.dim() > len(p.event_shape) else 1
        now = SharedArguments(args, kwargs, num_rows)
        for before in now.earliest(self._first[name]):
            if now.differing(before) and before.is_due():
                check_shared_arguments(name, p, x, model, now, before, values(), who)


class SharedArguments:
    """Arguments of the model that all rows of a call share, whatever its number of rows.

    Numbers, tensors without rows, and what the rows of a tensor have in common if they are equal.

    Args:
        args: The model's arguments.
        kwargs: Its keyword arguments.
        num_rows: Rows of the site; tensors of that length have rows of their own.
    """

    def __init__(self, args: Any, kwargs: Any, num_rows: int) -> None:
        shared = {k: _shared_value(a, num_rows) for k, a in named(args, kwargs).items()}
        self._shared = {k: a for k, a in shared.items() if a is not None}
        self.args: Any = args if self._shared else ()  # else the model is not run on them again
        self.kwargs: Any = kwargs if self._shared else {}
        self.num_changes = 0

    def earliest(self, first: dict[str, SharedArguments]) -> list[SharedArguments]:
        """Returns the calls in which all rows shared one of these arguments for the first time.

        Args:
            first: Such a call for every argument; gets this one where there is none yet.
        """
        calls = dict.fromkeys(first.setdefault(name, self) for name in self._shared)
        return [call for call in calls if call is not self]

    def is_due(self) -> bool:
        """Counts a call with other values; true for the first, second, fourth, ..."""
        self.num_changes += 1
        return is_power_of_two(self.num_changes)

    def differing(self, other: SharedArguments) -> list[str]:
        """Returns the names of those that have another value in another call."""
        both = self._shared.keys() & other._shared.keys()
        return [name for name in both if not _equal(self._shared[name], other._shared[name])]


def check_shared_arguments(
    name: str,
    p: EnergyDistribution,
    x: Tensor,
    model: Callable[..., Any],
    now: SharedArguments,
    before: SharedArguments,
    values: Any,
    who: str,
) -> None:
    """Raises ``ConditionalEnergyError`` if an energy depends on what differs between calls.

    Args:
        name: The site.
        p: Its law in this call.
        x: Its data in this call.
        model: The model.
        now: Arguments of this call.
        before: Arguments of an earlier one.
        values: Values of the model's latents.
        who: The objective.

    Warns:
        SurrogateWarning: If the model cannot be run on the earlier ones.
    """
    what = f"{', '.join(sorted(now.differing(before)))}, which changes from step to step"
    event = x.reshape((-1, *p.event_shape))[:1]
    try:
        with torch.no_grad(), without_value_checks(), aside():
            run = poutine.trace(poutine.condition(model, values))
            laws = (p, _law_in(run, now, name), _law_in(run, before, name))
            one, again, other = (_at_one_event(law, event) for law in laws)
            if not same_values(one, again):
                raise ValueError("two runs on the same arguments differ: dropout?")
    except Exception as error:  # models may do anything with their arguments
        warn_unchecked(name, f"whether the energy depends on {what}, could not be checked", error)
        return
    if not same_values(one, other):
        refuse(name, p, who, f" ({what})")


@buffers_restored()
def _law_in(run: poutine.trace, call: SharedArguments, name: str) -> Any:
    """The law of a site in a run of the model on the arguments of a call."""
    return unwrap(run.get_trace(*call.args, **call.kwargs).nodes[name]["fn"])


@buffers_restored()
def _at_one_event(law: Any, event: Tensor) -> Tensor:
    """The energy of one event in the first row of a law."""
    rows = event.expand(law.batch_shape + law.event_shape)
    return law.unnormalized_log_prob(rows).flatten()[:1]


def _shared_value(value: Any, num_rows: int) -> Any:
    """Returns what all rows have of an argument, or ``None`` where they differ.

    A single row has nothing in common with another.
    """
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float)) else None
    if value.dim() == 0 or len(value) != num_rows:
        return value
    return value[0] if num_rows > 1 and bool((value == value[0]).all()) else None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and bool((one == other).all()))
    return type(one) is type(other) and bool(one == other)
