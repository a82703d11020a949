"""The one global setting: what to do when a missing log Z would bend an answer.

``pyro.settings.set(ebm_missing_normalizer="error" | "warn" | "ignore")``, read at every call.
"""

from __future__ import annotations

import pyro.settings

MISSING_NORMALIZER = "error"


@pyro.settings.register("ebm_missing_normalizer", __name__, "MISSING_NORMALIZER")
def _validate_missing_normalizer(value: str) -> None:
    if value not in ("error", "warn", "ignore"):
        raise ValueError(
            f"ebm_missing_normalizer must be 'error', 'warn' or 'ignore', got {value!r}"
        )


def missing_normalizer_policy() -> str:
    """Returns the policy in force now."""
    return MISSING_NORMALIZER
