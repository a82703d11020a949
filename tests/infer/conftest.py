"""Double precision, and draws that belong to the rows of the data."""

from __future__ import annotations

import pytest
import torch
from one_site import rows_in


@pytest.fixture(autouse=True)
def double_precision(fresh_state):
    """Identities are checked to 1e-10; ``fresh_state`` puts the old dtype back."""
    torch.set_default_dtype(torch.float64)


PER_ROW = {"log_noise_data", "between", "log_mass"}  # the rest has a dim of draws before the rows


def beside(field, values, rows):
    """Returns what a contrast holds beside these rows."""
    if values is None:
        return None
    return values[rows] if field in PER_ROW else values[:, rows]


@pytest.fixture
def attach():
    """Returns a function that draws an objective's contrast once and ties it to the data's rows.

    Every later evaluation finds the same draws beside the same row, in whatever shape or order the
    rows come.
    """

    def tie(objective, p, data, noise=None):
        with torch.no_grad():
            whole = objective.draw(p, data, noise)

        def draw(p, x, noise):
            rows = rows_in(x, data)
            return type(whole)(**{k: beside(k, t, rows) for k, t in whole._asdict().items()})

        objective.draw = draw
        return whole

    return tie
