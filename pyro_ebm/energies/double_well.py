r"""The symmetric double well, the smallest problem on which a local sampler gets stuck.

.. math::
    E(x) = h \sum_i (x_i^2 - 1)^2

The minima lie at :math:`x_i = \pm 1`, the barrier between them is ``height`` nats.
At ``height=4`` in one dimension, :math:`Z = 0.9478378330` and :math:`E[x^2] = 0.9176708607`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyro_ebm.energies.closed_form import pad_right
from pyro_ebm.energies.even_product import DEPTH, EvenProductEnergy


class DoubleWell(EvenProductEnergy):
    """A double well in every coordinate: ``2^d`` equal modes in ``d`` dimensions.

    Log Z is by deterministic quadrature to rounding error and draws are exact; see
    :mod:`.even_product`.

    Args:
        height: Barrier in nats, positive, shape ``batch``.
        event_shape: Shape of one event; ``()`` for scalars.

    Raises:
        ValueError: If a number given as ``height`` is not positive.

    Example:
        >>> import torch
        >>> energy = DoubleWell(4.0)
        >>> energy(torch.tensor([0.0, 1.0, -1.0]))
        tensor([4., 0., 0.])
        >>> round(energy.log_normalizer().exp().item(), 5)
        0.94784
    """

    height: Tensor

    def __init__(self, height: float | Tensor = 4.0, *, event_shape: Sequence[int] = ()) -> None:
        super().__init__(event_shape)
        self._set("height", height, positive=True)

    def _curve(self, x: Tensor, num_dims: int) -> Tensor:
        return pad_right(self._arg("height", x), num_dims) * (x.square() - 1.0).square()

    def _interval(self) -> tuple[Tensor, Tensor, Tensor]:
        # V = DEPTH at x^2 = 1 +- sqrt(DEPTH / height).
        spread = (DEPTH / self.height).sqrt()
        low = (1.0 - spread).clamp(min=0.0).sqrt()
        return low, spread.new_ones(spread.shape), (1.0 + spread).sqrt()
