"""Running a model on the side, to look at it: nothing else may notice."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pyro
from pyro import poutine
from pyro.params.param_store import ParamStoreDict
from pyro.util import get_rng_state, set_rng_state

from pyro_ebm.ops.module_calls import buffers_restored
from pyro_ebm.ops.rng import rng_preserved


@contextmanager
def aside() -> Iterator[None]:
    """Surrounds runs of a model that leave no trace.

    Handlers around see none of their sites. After the block the generators (torch, NumPy, Python)
    and the buffers of modules are as they were, and the parameter store has the names that it had.
    Gradients are followed as outside of it.

    Example:
        >>> with pyro.poutine.trace() as seen, aside():
        ...     _ = pyro.param("a", torch.tensor(1.0))
        >>> "a" in seen.trace, "a" in pyro.get_param_store()
        (False, False)
    """
    store, state = pyro.get_param_store(), get_rng_state()
    before = set(store.keys())
    try:
        with rng_preserved(), buffers_restored(), poutine.block():
            yield
    finally:
        set_rng_state(state)
        _forget(store, set(store.keys()) - before)


def _forget(store: ParamStoreDict, names: Collection[str]) -> None:
    """Takes names out of the store; ``del store[name]`` fails if a tensor has several."""
    for name in names:
        del store._params[name], store._constraints[name]
    if names:
        store._param_to_name = {p: name for name, p in store._params.items()}
