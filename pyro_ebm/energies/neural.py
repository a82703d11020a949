r"""Neural energies for vectors and small images.

.. math::
    E(x) = f_w(x) + \tfrac c2 \lVert x \rVert^2

A network alone rarely makes a proper density on an unbounded space: :math:`f_w` may fall without
limit. The quadratic ``confinement`` :math:`c` makes it one whenever :math:`f_w` grows slower than a
square, as every network with a Lipschitz activation does; a normalized base distribution serves the
same end.

Only smooth activations are taken, since score matching and Langevin dynamics differentiate the
energy twice.

**Spectral norm** bounds the steepness of the energy. Torch estimates the norm by power iteration,
one step per forward pass *in training mode*, which changes buffers: two evaluations of one point
then differ, by as much as the iteration lags behind the weights. Samplers should see the energy in
``eval()`` mode, where it is a fixed function that can be vmapped and traced. In training mode
``vmap`` works too, but a traced graph goes on iterating at every call and runs under ``no_grad``
only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.closed_form import check_event_shape

Activation = Literal["silu", "softplus", "gelu", "tanh", "mish"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "mish": nn.Mish,
}


class _NeuralEnergy(Energy):
    """A network on ``rows + network_shape`` with one output, under any leading dims of ``x``."""

    confinement: Tensor

    def __init__(self, event_shape: Sequence[int], confinement: float | Tensor) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        if isinstance(confinement, Real) and not confinement >= 0:
            raise ValueError(f"confinement must not be negative, got {confinement}")
        self.confined = not (isinstance(confinement, Real) and confinement == 0)
        self._set("confinement", confinement)
        self.net: nn.Module = nn.Identity()
        self.network_shape = self.event_shape

    def forward(self, x: Tensor) -> Tensor:
        """Returns energies of shape ``sample + batch``."""
        check_event_shape(x, self.event_shape, type(self).__name__)
        lead = x.shape[: x.dim() - len(self.event_shape)]
        rows = x.reshape((math.prod(lead), *self.network_shape))
        energy: Tensor = self.net(rows).reshape(lead)
        if not self.confined:
            return energy
        square = rows.square().flatten(1).sum(-1).reshape(lead)
        return energy + 0.5 * self._arg("confinement", x) * square


class MLPEnergy(_NeuralEnergy):
    """A multilayer perceptron on the flattened event.

    Args:
        event_shape: Shape of one event; an integer ``d`` stands for ``(d,)``, and ``()`` for
            scalars.
        hidden: Widths of the hidden layers.
        activation: ``"silu"``, ``"softplus"``, ``"gelu"``, ``"tanh"`` or ``"mish"``.
        spectral_norm: Whether to bound each layer's spectral norm by one.
        confinement: Coefficient ``c >= 0`` of ``|x|^2 / 2`` added to the network.

    Raises:
        ValueError: If the activation is not a smooth one of the list, or ``confinement`` is
            negative.

    Example:
        >>> energy = MLPEnergy(2, hidden=(32, 32), confinement=0.1)
        >>> energy(torch.randn(7, 5, 2)).shape
        torch.Size([7, 5])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (128, 128),
        *,
        activation: Activation = "silu",
        spectral_norm: bool = False,
        confinement: float | Tensor = 0.0,
    ) -> None:
        shape = (event_shape,) if isinstance(event_shape, int) else event_shape
        super().__init__(shape, confinement)
        self.network_shape = torch.Size([self.event_shape.numel()])
        widths = (*self.network_shape, *hidden)
        layers: list[nn.Module] = []
        for width, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [_linear(width, after, spectral_norm), _smooth(activation)]
        self.net = nn.Sequential(*layers, _linear(widths[-1], 1, spectral_norm))


class ConvEnergy(_NeuralEnergy):
    """A convolutional network for images of about 8 x 8 to 28 x 28 pixels.

    Each 3 x 3 convolution halves the sides; a linear layer reads the rest.

    Args:
        event_shape: ``(height, width)`` or ``(channels, height, width)``.
        channels: Output channels of the convolutions.
        activation: ``"silu"``, ``"softplus"``, ``"gelu"``, ``"tanh"`` or ``"mish"``.
        spectral_norm: Whether to normalize each layer's weight, as a matrix, to spectral norm one.
        confinement: Coefficient ``c >= 0`` of ``|x|^2 / 2`` added to the network.

    Raises:
        ValueError: If ``event_shape`` has not two or three dims, the activation is not a smooth one
            of the list, or ``confinement`` is negative.

    Example:
        >>> energy = ConvEnergy((8, 8), channels=(16, 32))
        >>> energy(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        channels: Sequence[int] = (32, 64),
        *,
        activation: Activation = "silu",
        spectral_norm: bool = False,
        confinement: float | Tensor = 0.0,
    ) -> None:
        if len(event_shape) not in (2, 3):
            raise ValueError(
                f"event_shape must be (height, width) or (channels, height, width), "
                f"got {tuple(event_shape)}"
            )
        super().__init__(event_shape, confinement)
        self.network_shape = torch.Size((1, *event_shape)[-3:])
        sizes = (self.network_shape[0], *channels)
        layers: list[nn.Module] = []
        for size, after in zip(sizes[:-1], sizes[1:], strict=True):
            conv = nn.Conv2d(size, after, kernel_size=3, stride=2, padding=1)
            layers += [_normed(conv, spectral_norm), _smooth(activation)]
        height, width = (_halved(side, len(channels)) for side in self.network_shape[1:])
        self.net = nn.Sequential(
            *layers, nn.Flatten(), _linear(sizes[-1] * height * width, 1, spectral_norm)
        )


def _smooth(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}. "
            "Energies are differentiated twice in score matching, so functions with a kink, "
            "such as ReLU, are not offered."
        )
    return _ACTIVATIONS[name]()


def _linear(width: int, after: int, normed: bool) -> nn.Module:  # noqa: FBT001
    return _normed(nn.Linear(width, after), normed)


def _normed(layer: nn.Module, normed: bool) -> nn.Module:  # noqa: FBT001
    return parametrizations.spectral_norm(layer) if normed else layer


def _halved(side: int, times: int) -> int:
    return math.ceil(side / 2**times)
