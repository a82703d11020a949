"""What every test starts from: one thread, a seed of its own, Pyro and torch as imported."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"

import pyro
import pytest
import torch

torch.set_num_threads(1)

# These run in an environment of their own, without torch: `make test-arviz1`.
collect_ignore = ["arviz1"]


def seed_of(nodeid: str) -> int:
    """Returns the seed of a test: the same in every run and on every worker, its own for each."""
    return zlib.crc32(nodeid.encode())


@pytest.fixture(autouse=True)
def fresh_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds the test from its own name and undoes what it changes globally."""
    settings = pyro.settings.get()
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed_of(request.node.nodeid))
    yield
    pyro.clear_param_store()
    pyro.settings.set(**settings)
    torch.set_default_dtype(dtype)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
