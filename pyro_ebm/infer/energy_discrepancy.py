r"""Energy discrepancy: learning an energy by comparing data with perturbed data.

It needs no log Z, no MCMC and no score.

.. math::
    L = E\,\log\Big(\frac wM + \frac1M \sum_{j=1}^M e^{U(x) - U(x'_j)}\Big), \qquad
    x'_j = x + \sqrt t\,\xi + \sqrt t\,\xi'_j

with one :math:`\xi` shared by the M negatives of a row. For :math:`w = 1` this is ranking NCE with
M exchangeable negatives given :math:`y = x + \sqrt t\,\xi`, hence consistent for every M; other w
are biased at finite M. As :math:`t \to 0` it becomes score matching, as :math:`t \to \infty`
maximum likelihood: :math:`\sqrt t` is the range over which relative mass is seen.

On a constrained support the perturbation acts on the unconstrained coordinates, and U there
includes the Jacobian.

Schröder, Ou, Lim, Li, Vollmer and Duncan, Energy Discrepancies, NeurIPS 2023, arXiv:2307.06431.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.contrast import Contrast, elementwise, rows_of
from pyro_ebm.infer.objective import Objective
from pyro_ebm.ops.constraints import base_measure
from pyro_ebm.ops.spaces import bijection


class EnergyDiscrepancy(Objective):
    r"""Gaussian energy discrepancy.

    A guide site of the same name is taken as the law of the perturbation :math:`\xi` instead (same
    event shape, unconstrained).

    Args:
        time: :math:`t`, the perturbation's variance in squared units of (unconstrained) x; or
            ``(low, high)`` to draw it per row, log-uniformly, where the scale is not known.
        num_negatives: M.
        stabilization: :math:`w > 0`.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If an argument is not positive.
        NotImplementedError: On a discrete support.

    Warns:
        SurrogateWarning: If ``stabilization`` is not 1.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=data)
        >>> objective = EnergyDiscrepancy(time=1.0, num_negatives=16)
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.02}), loss=objective)
        >>> data = torch.randn(1000)
        >>> losses = [svi.step(data) for _ in range(200)]
        >>> abs(pyro.param("precision").item() - 1 / data.var().item()) < 0.2
        True
    """

    def __init__(
        self,
        time: float | tuple[float, float] = 1.0,
        num_negatives: int = 16,
        *,
        stabilization: float = 1.0,
        **elbo: Any,
    ) -> None:
        super().__init__(**elbo)
        times = time if isinstance(time, tuple) else (time, time)
        if len(times) != 2 or not 0 < times[0] <= times[1]:
            raise ValueError(
                f"time must be positive, or (low, high) with 0 < low <= high, got {time!r}"
            )
        if num_negatives < 1 or not stabilization > 0:
            raise ValueError(
                f"num_negatives and stabilization must be positive, got {num_negatives!r} and "
                f"{stabilization!r}; at stabilization 0 the loss is unbounded below"
            )
        if stabilization != 1:
            warnings.warn(
                "EnergyDiscrepancy is biased at finite num_negatives unless stabilization is 1, "
                f"got {stabilization}",
                SurrogateWarning,
                stacklevel=2,
            )
        self.times = times
        self.num_negatives = num_negatives
        self.stabilization = stabilization

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws the perturbed data, in unconstrained coordinates."""
        u = self._space(p).inv(x)
        rows = torch.Size((self.num_negatives,))
        if noise is not None:
            law = self._perturbation(noise, p, u)
            return Contrast(u + law.sample() - law.sample(rows))
        scale = self._scales(p, x).sqrt()
        there, back = (
            torch.randn_like(u),
            torch.randn(rows + u.shape, dtype=u.dtype, device=u.device),
        )
        return Contrast(u + scale * (there + back))

    @staticmethod
    def _perturbation(noise: Any, p: EnergyDistribution, u: Tensor) -> Any:
        law = elementwise(noise, len(p.event_shape))
        rows, event = (
            u.shape[: u.dim() - len(p.event_shape)],
            u.shape[u.dim() - len(p.event_shape) :],
        )
        if law.event_shape != event:
            raise ValueError(
                f"the guide's law of the perturbation has event_shape {tuple(law.event_shape)}; "
                f"the unconstrained coordinates of an event have {tuple(event)}"
            )
        return law.expand(rows)

    def _scales(self, p: EnergyDistribution, x: Tensor) -> Tensor:
        low, high = (math.log(t) for t in self.times)
        share = torch.rand(rows_of(p, x), dtype=x.dtype, device=x.device)
        times = torch.exp(low + (high - low) * share)
        return times.reshape(times.shape + (1,) * len(p.event_shape))

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns the stabilized log mean exponential difference of potentials, in nats."""
        space = self._space(p)
        points = torch.cat([space.inv(x).unsqueeze(0), contrast.points])
        potential = self._potential(p, space, points)
        differences = potential[:1] - potential[1:]
        stabilizer = torch.full_like(differences[:1], math.log(self.stabilization))
        loss = torch.logsumexp(torch.cat([differences, stabilizer]), 0) - math.log(
            self.num_negatives
        )
        self.evaluation.note(accuracy=(differences < 0).double())
        return loss

    @staticmethod
    def _potential(p: EnergyDistribution, space: Transform, u: Tensor) -> Tensor:
        x = space(u)
        return p.potential(x) - space.log_abs_det_jacobian(u, x)

    @staticmethod
    def _space(p: EnergyDistribution) -> Transform:
        if base_measure(p.support) != "lebesgue":
            raise NotImplementedError(
                f"EnergyDiscrepancy perturbs continuous data, but the support is {p.support}; use "
                "NCE"
            )
        return bijection(p.support, len(p.event_shape))
