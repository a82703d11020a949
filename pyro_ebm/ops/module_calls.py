"""Watching which modules are called, and keeping their buffers.

Running means, the vectors of spectral norms and the like change with every call, and
``pyro.module`` tells of a module's parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def noting_calls(called: list[nn.Module]) -> Iterator[None]:
    """Appends every module that is called within the block and is no part of an earlier one."""
    with _before_first_calls(called, called.append):
        yield


@contextmanager
def buffers_restored() -> Iterator[None]:
    """After the block, the buffers of modules that are called in it are as they were.

    Those that nothing has changed are not touched, as they may have a graph: latents that energies
    keep. Nothing changes buffers in place under ``vmap``, from where none is seen outside.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module) -> None:
        buffers = (b for b in module.buffers() if not is_functorch_wrapped_tensor(b))
        kept.extend((buffer, buffer.clone()) for buffer in buffers)

    try:
        with _before_first_calls([], keep):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in reversed(kept):  # parts may be called before the whole
                if not torch.equal(buffer, value):  # batch_norm moves no version
                    buffer.copy_(value)


@contextmanager
def _before_first_calls(
    earlier: Iterable[nn.Module], do: Callable[[nn.Module], None]
) -> Iterator[None]:
    known = {id(part) for module in earlier for part in module.modules()}

    def note(module: nn.Module, args: Any) -> None:
        if id(module) not in known:
            known.update(map(id, module.modules()))
            do(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()
