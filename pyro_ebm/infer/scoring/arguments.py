"""Arguments of a model, with those inside lists, tuples and dicts, by names that a user knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path


def named(args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns all arguments by name.

    Example:
        >>> named((1.0, [2.0, {"t": 3.0}]), {"s": 4.0})
        {'argument 0': 1.0, 'argument 1[0]': 2.0, "argument 1[1]['t']": 3.0, "argument 's'": 4.0}
    """
    leaves, _ = tree_flatten_with_path((tuple(args), dict(kwargs)))
    return {_name(path): value for path, value in leaves}


def mapped(change: Callable[[str, Any], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Returns arguments of the same structure: what ``change`` returns for each name and value.

    Example:
        >>> mapped(lambda name, value: name, ([2.0],), {"scale": 4.0})
        ((['argument 0[0]'],), {'scale': "argument 'scale'"})
    """
    given = (tuple(args), dict(kwargs))
    new: tuple[Any, Any] = tree_map_with_path(lambda path, value: change(_name(path), value), given)
    return new


def _name(path: tuple[Any, ...]) -> str:
    """The name of a leaf of ``(args, kwargs)``."""
    _, which, *inner = path
    top = which.idx if hasattr(which, "idx") else repr(which.key)
    return f"argument {top}{keystr(tuple(inner))}"
