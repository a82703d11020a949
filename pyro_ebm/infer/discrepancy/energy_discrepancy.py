r"""Energy discrepancy: learning an energy by comparing data with perturbed data.

It needs no log Z, no MCMC and no score. A perturbation takes x there, :math:`y \sim q(\cdot|x)`,
and M times back, :math:`x'_j \sim \rho_y = q(y|\cdot) / c(y)`
(:mod:`~pyro_ebm.infer.discrepancy.perturbations`):

.. math::
    L = E\,\log\Big(c(y)\Big[\frac wM + \frac1M \sum_{j=1}^M e^{U(x) - U(x'_j)}\Big]\Big).

As :math:`M \to \infty` it is :math:`E\,U(x) - E\,U_q(y)` with
:math:`e^{-U_q(y)} = \sum_{x'} q(y|x') e^{-U(x')}`, smallest where :math:`e^{-U}` is the law of the
data. For :math:`w = 1` it is ranking NCE with M exchangeable negatives given y, hence consistent
for every M; other w are biased at finite M. At a constant U it is :math:`\log((1 + M)/M)` plus the
mean of log c, which is 0 for symmetric q.

With Gaussian perturbations, here, :math:`x'_j = x + \sqrt t\,\xi + \sqrt t\,\xi'_j`, with one
:math:`\xi` shared by the M negatives of a row. As :math:`t \to 0` it becomes score matching, as
:math:`t \to \infty` maximum likelihood: :math:`\sqrt t` is the range over which relative mass is
seen. For discrete and mixed data see
:mod:`~pyro_ebm.infer.discrepancy.discrete_energy_discrepancy`.

On a constrained support the perturbation acts on the unconstrained coordinates, and U there
includes the Jacobian.

Schröder, Ou, Lim, Li, Vollmer and Duncan, Energy Discrepancies, NeurIPS 2023, arXiv:2307.06431.
"""

from __future__ import annotations

from typing import Any

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrepancy.perturbation_contrast import PerturbationContrast
from pyro_ebm.infer.discrepancy.perturbations import GaussianNoise, LawNoise, Perturbation, Times
from pyro_ebm.infer.discrepancy.perturbed_space import PerturbedSpace
from pyro_ebm.infer.scoring.contrast import elementwise


class EnergyDiscrepancy(PerturbationContrast):
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
        time: Times = 1.0,
        num_negatives: int = 16,
        *,
        stabilization: float = 1.0,
        **elbo: Any,
    ) -> None:
        super().__init__(GaussianNoise(time), num_negatives, stabilization=stabilization, **elbo)

    def space(self, p: EnergyDistribution) -> PerturbedSpace:
        """Returns the unconstrained coordinates.

        Raises:
            NotImplementedError: On a support that is not continuous.
        """
        if p.base_measure != "lebesgue":
            raise NotImplementedError(
                f"EnergyDiscrepancy perturbs continuous data, but the support is {p.support}; use "
                "DiscreteEnergyDiscrepancy on discrete supports and mixed tables, or NCE"
            )
        return super().space(p)

    def perturbation_of(self, p: EnergyDistribution, noise: Any) -> Perturbation:
        """Returns the guide's law of the perturbation, else Gaussian noise."""
        if noise is None:
            return self.perturbation
        return LawNoise(elementwise(noise, len(p.event_shape)))
