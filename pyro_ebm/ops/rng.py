"""Drawing without leaving a trace in the generators."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def rng_preserved() -> AbstractContextManager[Any]:
    """Returns a block after which torch's generators stand where they stood before.

    Those of CUDA devices are included once CUDA is in use.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(devices=devices)
