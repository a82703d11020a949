r"""The even quartic, the standard non-Gaussian problem on the line.

.. math::
    E(x) = \sum_i a x_i^4 + b x_i^2

With :math:`b = 0` the normalizer in one dimension is :math:`2\,\Gamma(5/4)\, a^{-1/4}` and
:math:`E[x^2] = a^{-1/2}\, \Gamma(3/4) / \Gamma(1/4)`; with :math:`b < 0` there are two wells of
depth :math:`b^2 / 4a`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.energies.closed_form import pad_right
from pyro_ebm.energies.even_product import DEPTH, EvenProductEnergy


class Quartic(EvenProductEnergy):
    """An even quartic in every coordinate.

    Log Z is by deterministic quadrature to rounding error and draws are exact; see
    :mod:`.even_product`.

    Args:
        quartic: Coefficient ``a > 0`` of the fourth power, shape ``batch``.
        quadratic: Coefficient ``b`` of the square, any sign, broadcastable with ``quartic``.
        event_shape: Shape of one event; ``()`` for scalars.

    Raises:
        ValueError: If a number given as ``quartic`` is not positive.

    Example:
        >>> energy = Quartic(0.25, -0.5)
        >>> energy(torch.tensor([1.0, 2.0]))
        tensor([-0.2500,  2.0000])
        >>> round(energy.log_normalizer().exp().item(), 4)
        3.9051
    """

    quartic: Tensor
    quadratic: Tensor

    def __init__(
        self,
        quartic: float | Tensor = 1.0,
        quadratic: float | Tensor = 0.0,
        *,
        event_shape: Sequence[int] = (),
    ) -> None:
        super().__init__(event_shape)
        self._set("quartic", quartic, positive=True)
        self._set("quadratic", quadratic)

    def _curve(self, x: Tensor, num_dims: int) -> Tensor:
        a, b = (pad_right(self._arg(name, x), num_dims) for name in ("quartic", "quadratic"))
        square = x.square()
        return (a * square + b) * square

    def _interval(self) -> tuple[Tensor, Tensor, Tensor]:
        # V = min V + DEPTH at x^2 = (-b +- sqrt(4 a DEPTH)) / 2a for b < 0, where V has two wells,
        # and at the positive root of a x^4 + b x^2 = DEPTH, free of cancellation, for b >= 0.
        a, b = torch.broadcast_tensors(self.quartic, self.quadratic)
        spread = (4.0 * a * DEPTH).sqrt()
        single = 2.0 * DEPTH / (b.abs() + (b.square() + spread.square()).sqrt())
        high = torch.where(b < 0, (spread - b) / (2.0 * a), single)
        low = (-b - spread).clamp(min=0.0) / (2.0 * a)
        return low.sqrt(), ((-b).clamp(min=0.0) / (2.0 * a)).sqrt(), high.sqrt()
