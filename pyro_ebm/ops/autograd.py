r"""Gradients with respect to the input alone.

A sampler needs :math:`\nabla_x U(x)` and nothing else. Asking autograd for exactly that leaves
every parameter as it is: no ``requires_grad`` flag is toggled and no ``.grad`` is written, also
while a user's ``no_grad`` or ``inference_mode`` is in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

__all__ = ["grad_of"]


def grad_of(fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns ``fn(x)`` and its gradient with respect to ``x``, both detached.

    The gradient is that of the sum of all values, hence row-wise where row ``i`` of the value
    depends on row ``i`` of ``x`` only.

    Args:
        fn: Maps ``x`` to one value per row.
        x: A floating point tensor; it is not modified and its flags are not touched.

    Returns:
        The values, shaped as ``fn`` returns them, and the gradient, shaped as ``x``.

    Raises:
        ValueError: If the value does not depend on ``x``.

    Example:
        >>> import torch
        >>> with torch.inference_mode():
        ...     value, grad = grad_of(lambda x: x.square().sum(-1), torch.tensor([[1.0, 2.0]]))
        >>> value, grad
        (tensor([5.]), tensor([[2., 4.]]))
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        try:
            return _value_and_grad(fn, leaf)
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            with _CloneInferenceTensors():
                return _value_and_grad(fn, leaf)


def _value_and_grad(fn: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    value = fn(leaf)
    grad = None
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    if grad is None:
        raise ValueError(
            "the energy does not depend on x: its value carries no gradient with respect to x. "
            "Is x detached, rounded or taken out of torch inside the energy?"
        )
    return value.detach(), grad


class _CloneInferenceTensors(TorchFunctionMode):
    """Hands every operation normal copies of the inference tensors among its arguments.

    Autograd refuses to save inference tensors, such as a latent drawn under ``inference_mode`` that
    now parametrizes the energy. Their values are all that a gradient in x needs.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map_only(Tensor, _normal, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
