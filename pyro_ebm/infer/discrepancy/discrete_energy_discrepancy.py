r"""Energy discrepancy of discrete events and of tables with columns of several kinds.

.. math::
    L = E\,\log\Big(c(y)\Big[\frac wM + \frac1M \sum_{j=1}^M e^{U(x) - U(x'_j)}\Big]\Big), \qquad
    y \sim q(\cdot|x),\quad x'_j \sim q(y|\cdot) / c(y).

What is seen depends on how far the perturbation goes. With all sites flipped at probability 1/2 and
:math:`M \to \infty` it is minus the log likelihood less d log 2; with one masked site it is the
pseudo-likelihood divided by d; with a kernel that keeps the model's law it is one step of
contrastive divergence. Far perturbations need many negatives, for most of them lie where the energy
is high; near ones do not see the relative mass of what they do not connect.

References:
    Schröder, Ou, Li and Duncan, Training discrete EBMs with energy discrepancy, 2023,
    arXiv:2307.07595, and Energy-based modelling for discrete and mixed data via heat equations on
    structured spaces, NeurIPS 2024, arXiv:2412.01019.
"""

from __future__ import annotations

from typing import Any

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrepancy.perturbation_contrast import PerturbationContrast
from pyro_ebm.infer.discrepancy.perturbations import Perturbation
from pyro_ebm.infer.discrepancy.perturbed_space import PerturbedSpace

__all__ = ["DiscreteEnergyDiscrepancy"]


class DiscreteEnergyDiscrepancy(PerturbationContrast):
    """Energy discrepancy of booleans, spins, categories, and vectors that also have real columns.

    Args:
        perturbation: ``BernoulliFlips``, ``SiteFlip``, ``MaskedSite`` or ``HeatKernel``
            (:mod:`~pyro_ebm.infer.discrepancy.site_perturbations`), ``MixedColumns`` for a support
            made by ``constraints.cat``, or anything with their three methods.
        num_negatives: M.
        stabilization: :math:`w > 0`.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        TypeError: If the perturbation is none.
        ValueError: If a number is not positive, an observation lies outside its site's values, or
            the guide holds a contrast for the site.
        NotImplementedError: On continuous supports, on counts without a bound, and where the
            perturbation does not fit the support.

    Warns:
        SurrogateWarning: If ``stabilization`` is not 1.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> from pyro_ebm.energies import Ising
        >>> from pyro_ebm.infer.discrepancy.site_perturbations import BernoulliFlips
        >>> _ = pyro.set_rng_seed(0)
        >>> data = Ising(0.2, (6, 6)).sample((500,))
        >>> def model(data):
        ...     energy = Ising(pyro.param("coupling", torch.tensor(0.0)), (6, 6))
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("x", EnergyDistribution(energy), obs=data)
        >>> objective = DiscreteEnergyDiscrepancy(BernoulliFlips(0.1))
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.01}), loss=objective)
        >>> losses = [svi.step(data) for _ in range(100)]
        >>> abs(pyro.param("coupling").item() - 0.2) < 0.03
        True
    """

    def __init__(
        self,
        perturbation: Perturbation,
        num_negatives: int = 32,
        *,
        stabilization: float = 1.0,
        **elbo: Any,
    ) -> None:
        lacking = [name for name in _METHODS if not callable(getattr(perturbation, name, None))]
        if isinstance(perturbation, type) or lacking:
            raise TypeError(
                "perturbation must be an object with the methods there, back and log_mass, such as "
                f"BernoulliFlips(0.1), got {perturbation!r}"
            )
        super().__init__(perturbation, num_negatives, stabilization=stabilization, **elbo)

    def space(self, p: EnergyDistribution) -> PerturbedSpace:
        """Returns the coordinates that are perturbed.

        Raises:
            NotImplementedError: On a support without discrete sites.
        """
        if p.base_measure not in ("counting", "mixed"):
            raise NotImplementedError(
                "DiscreteEnergyDiscrepancy perturbs discrete sites, but the support is "
                f"{p.support}; use EnergyDiscrepancy on continuous supports"
            )
        return super().space(p)

    def perturbation_of(self, p: EnergyDistribution, noise: Any) -> Perturbation:
        """Returns the perturbation; a guide cannot hold one of discrete sites.

        Raises:
            ValueError: If the guide holds one.
        """
        if noise is not None:
            raise ValueError(
                "DiscreteEnergyDiscrepancy takes its perturbation as an argument, but the guide "
                f"holds {noise!r} at the site; remove that site from the guide"
            )
        return self.perturbation


_METHODS = ("there", "back", "log_mass")
