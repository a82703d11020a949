r"""Conditional noise-contrastive estimation: every datum against noise made from that datum.

A noisy copy :math:`x' \sim p_c(\cdot \mid x)` could as well have been the datum and :math:`x` its
copy. Which of the two orders is right is a logistic regression on

.. math::
    G = U(x') - U(x) + \log p_c(x' \mid x) - \log p_c(x \mid x'), \qquad
    L = E\,\mathrm{softplus}(-G),

from which log Z cancels, row by row: conditional models are learned consistently, and noise needs
no density over the whole space. A symmetric :math:`p_c` cancels too. With Gaussian noise of
variance :math:`2t` this is energy discrepancy with one negative and weight one. As the noise
shrinks, :math:`2 (L - \log 2) / t` tends to the score matching loss and the variance of the
estimate to infinity; far too much noise is told from data without error, and then nothing is
learned either.

Gaussian noise acts on the unconstrained coordinates of a constrained support, with their Jacobian.

Ceylan and Gutmann, Conditional noise-contrastive estimation of unnormalised models, ICML 2018,
arXiv:1806.03664.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform
from torch.nn.functional import softplus

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.scoring.contrast import contrast_law, elementwise, with_data
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.unconstrained import check_interior
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.constraints import base_measure
from pyro_ebm.ops.spaces import bijection

CLOSE = 0.75  # of log 2: below it an estimate's variance is near its least, in any dimension
MIN_ROWS_PER_COORDINATE = 4
SCALES = 2.0 ** torch.arange(-12.0, 5.0)


class NoisyCopies(NamedTuple):
    r"""Noisy copies of the data.

    Args:
        points: Shape ``(M,) + rows + event``: M copies of every datum.
        log_ratio: :math:`\log p_c(x' | x) - \log p_c(x | x')` in nats, ``(M,) + rows``.
    """

    points: Tensor
    log_ratio: Tensor


class ConditionalNCE(Objective):
    r"""Conditional NCE.

    Where neither ``noise`` nor a guide's site says otherwise, noise is Gaussian with standard
    deviation ``scale * unit`` in every coordinate. A guide site of the same name is the law of
    :math:`\xi` in :math:`x' = x + \xi - \xi'`, two independent draws (same event shape,
    unconstrained).

    Args:
        num_noise: Noisy copies per datum, over which the loss is averaged.
        noise: ``x -> distribution``: the law of a copy of every row of ``x``, row by row, with a
            density on the EBM's support, discrete ones included. It is never trained.
        scale: :math:`\varepsilon`, the Gaussian noise's range as a fraction of ``unit``. ``None``
            doubles it, from far below, until the loss of a Gaussian with the moments of the first
            batch is under three quarters of log 2, its value at no noise. (Ceylan and Gutmann
            double it until the fitted model's loss is; here nothing is fitted yet.)
        unit: What the scale multiplies, in units of the (unconstrained) coordinates; ``None`` takes
            the standard deviations of the first batch.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If an argument is not positive, or the first batch has no spread to measure.
        NotImplementedError: On a discrete support without ``noise``.

    Warns:
        SurrogateWarning: If ``unit`` is so far from the data's spread that no scale is found.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=data)
        >>> optimizer = pyro.optim.Adam({"lr": 0.05})
        >>> svi = SVI(model, lambda data: None, optimizer, loss=ConditionalNCE())
        >>> data = torch.randn(1000)
        >>> losses = [svi.step(data) for _ in range(200)]
        >>> abs(pyro.param("precision").item() - 1 / data.var().item()) < 0.2
        True
    """

    def __init__(
        self,
        num_noise: int = 10,
        noise: Callable[[Tensor], Any] | None = None,
        *,
        scale: float | None = None,
        unit: float | Tensor | None = None,
        **elbo: Any,
    ) -> None:
        super().__init__(**elbo)
        if noise is not None and (scale is not None or unit is not None):
            raise ValueError("scale and unit are of Gaussian noise; give them or noise, not both")
        for name, value in {"scale": scale, "unit": unit}.items():
            if value is not None and not bool((torch.as_tensor(value) > 0).all()):
                raise ValueError(f"{name} must be positive, got {value!r}")
        self.num_noise = whole("num_noise", num_noise, least=1)
        self.noise = noise
        self.scale = scale
        self.unit = unit

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> NoisyCopies:
        """Draws noisy copies, and the log ratio of their density to that of the way back."""
        if noise is None and self.noise is not None:
            return self._from_law(self.noise, p, x)
        space = _space(p)
        check_interior(self.evaluation.site, p, x, type(self).__name__)
        u = space.inv(x)
        event_dim = space.domain.event_dim
        copies = u + (
            self._gaussian(u, event_dim)
            if noise is None
            else self._differences(noise, u, event_dim)
        )
        points = space(copies)
        forth = -space.log_abs_det_jacobian(copies, points)
        return NoisyCopies(points, forth + space.log_abs_det_jacobian(u, x))

    def _from_law(
        self, noise: Callable[[Tensor], Any], p: EnergyDistribution, x: Tensor
    ) -> NoisyCopies:
        who = type(self).__name__
        there = contrast_law(noise(x), p, x, needs_density=True, who=who)
        points = there.sample(torch.Size((self.num_noise,)))
        back = contrast_law(noise(points), p, points, needs_density=True, who=who)
        return NoisyCopies(points, there.log_prob(points) - back.log_prob(x.expand(points.shape)))

    def _differences(self, noise: Any, u: Tensor, event_dim: int) -> Tensor:
        law = elementwise(noise, event_dim)
        rows, event = _split(u, event_dim)
        if law.event_shape != event:
            raise ValueError(
                f"the guide's law of the perturbation has event_shape {tuple(law.event_shape)}; "
                f"the unconstrained coordinates of an event have {tuple(event)}"
            )
        law, draws = law.expand(rows), torch.Size((self.num_noise,))
        return law.sample(draws) - law.sample(draws)

    def _gaussian(self, u: Tensor, event_dim: int) -> Tensor:
        site, (rows, event) = self.evaluation.site, _split(u, event_dim)
        if site not in self.fitted:
            self.fitted[site] = self._measured(self.evaluation.rows(u, len(rows)), event)
        scale, given = self.fitted[site]
        unit = torch.as_tensor(given, dtype=u.dtype, device=u.device)
        normal = torch.randn((self.num_noise, *u.shape), dtype=u.dtype, device=u.device)
        return scale * unit * normal

    def _measured(self, rows: Tensor, event: torch.Size) -> tuple[float, float | Tensor]:
        """Scale and unit, from the rows that count, ``(R,) + event``, where they are not given."""
        rows, unit, scale = rows.reshape(len(rows), -1), self.unit, self.scale
        if unit is None:
            if len(rows) < 2 or not bool((rows.std(0) != 0).all()):
                raise ValueError(
                    f"ConditionalNCE measures the data's spread in its first batch, but its "
                    f"{len(rows)} row(s) do not vary in every coordinate: give unit="
                )
            unit = rows.std(0).reshape(event)
        if scale is None:
            at = torch.as_tensor(unit, dtype=rows.dtype, device=rows.device)
            scale = doubled_scale(rows, at.expand(event).reshape(-1))
        return scale, unit

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: NoisyCopies, log_z: Tensor
    ) -> Tensor:
        """Returns the logistic loss of telling a datum from its noisy copies, in nats."""
        potential = p.potential(with_data(x, contrast.points))
        logits = potential[1:] - potential[:1] + contrast.log_ratio
        held = logits.detach()
        self.evaluation.note(accuracy=lambda: (held > 0).double())
        return softplus(-logits).mean(0)


@torch.no_grad()
def doubled_scale(rows: Tensor, unit: Tensor) -> float:
    r"""Returns the least power of two at which noise is clearly told from Gaussian data.

    With :math:`w` the whitened datum and :math:`v` the whitened noise at scale one,
    :math:`G(\varepsilon) = \varepsilon\, w \cdot v + \tfrac12 \varepsilon^2 |v|^2`.

    Args:
        rows: Data, ``(R, D)``.
        unit: The noise's standard deviations at scale one, ``(D,)``.

    Warns:
        SurrogateWarning: If it is none of those from ``2**-12`` to ``2**4``, of which the nearest
            is returned.

    Example:
        >>> doubled_scale(torch.randn(10_000, 32), torch.ones(32))
        0.25
    """
    noise = torch.randn_like(rows) * unit
    data, noise = _whitened(rows, rows - rows.mean(0)), _whitened(rows, noise)
    linear, square = (data * noise).sum(-1), 0.5 * noise.square().sum(-1)
    scales = SCALES.to(rows)
    logits = scales[:, None] * linear + scales[:, None] ** 2 * square
    is_close = softplus(-logits).mean(-1) > CLOSE * math.log(2)
    found = int(is_close.sum())
    if found in (0, len(scales)):
        _warn_of_end(is_told=found == 0)
    return float(scales[min(found, len(scales) - 1)])


def _warn_of_end(*, is_told: bool) -> None:
    least, largest = float(SCALES[0]), float(SCALES[-1])
    which = f"{least:.2g} times its unit is already" if is_told else f"{largest:g} units is not yet"
    warnings.warn(
        f"ConditionalNCE doubles its noise until it is told from the data, and noise of {which} "
        "told from them: give a unit= that is nearer to the data's spread, or scale=",
        SurrogateWarning,
        stacklevel=2,
    )


def _whitened(rows: Tensor, values: Tensor) -> Tensor:
    """Returns ``values`` in units of the rows' covariance, or of its diagonal with few rows."""
    num, dim = rows.shape
    factor, failed = torch.linalg.cholesky_ex(torch.cov(rows.T).reshape(dim, dim))
    if failed or num < MIN_ROWS_PER_COORDINATE * dim:
        return values / rows.std(0)
    return torch.linalg.solve_triangular(factor, values.T, upper=False).T


def _split(u: Tensor, event_dim: int) -> tuple[torch.Size, torch.Size]:
    """Splits the shape of unconstrained coordinates into rows and event."""
    at = u.dim() - event_dim
    return u.shape[:at], u.shape[at:]


def _space(p: EnergyDistribution) -> Transform:
    if base_measure(p.support) != "lebesgue":
        raise NotImplementedError(
            f"ConditionalNCE adds Gaussian noise to continuous data, but the support is "
            f"{p.support}: give noise=, a function from x to the law of a noisy copy, or use NCE"
        )
    return bijection(p.support, len(p.event_shape))
