"""Which dtypes take part in a computation.

A function in a closure cannot be asked for its parameters, and its result need not tell: torch
leaves a single tensor single beside a 0-d double one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Dtypes(TorchFunctionMode):
    """Collects the dtypes of tensors that torch functions take inside.

    Attributes:
        dtypes: What was seen.

    Example:
        >>> with Dtypes() as seen:
        ...     y = torch.ones(3) + torch.tensor(1.0, dtype=torch.float64)
        >>> y.dtype, torch.float64 in seen.dtypes
        (torch.float32, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set[torch.dtype]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function and notes what it was given."""
        leaves = tree_leaves((args, kwargs))
        self.dtypes.update(t.dtype for t in leaves if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))
