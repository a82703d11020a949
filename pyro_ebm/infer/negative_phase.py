r"""The part of likelihood training by Markov chains that does not depend on where they start.

The gradient of :math:`-\log p` is :math:`E_d \nabla U - E_p \nabla U`. The second term, the
*negative phase*, is an expectation under the model itself; states of chains stand in for its draws:

.. math:: L = U(x) - U(x^-) + \alpha \big(E(x)^2 + E(x^-)^2\big), \qquad x^- \text{ held}.

The gradient is right as far as the chains have converged. The value is no likelihood: it hovers
around zero and may have either sign. Since it tells nothing, the chains are watched instead: how
many ran off or stay where they are, and whether they have lost the data.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import (
    ApproximateSampleWarning,
    DivergedTrainingError,
    NonFiniteEnergyError,
    SurrogateWarning,
)
from pyro_ebm.infer.checks import SETTLED
from pyro_ebm.infer.contrast import Contrast, contrast_law, gap, rows_of
from pyro_ebm.infer.objective import Objective
from pyro_ebm.infer.transitions import KernelFactory, Moved, Mover, Transition
from pyro_ebm.mcmc.mala import MALA
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.initial_points import initial_points

Start = Literal["data", "base"]

DEFAULT_KERNEL = partial(MALA, step_size=0.1)
LEAST_ACCEPTANCE = 0.01


class NegativePhase(Objective):
    """What objectives share that compare the data with states of Markov chains, held.

    Args:
        num_steps: k, steps of the kernel at every use.
        kernel: Makes the kernel on continuous supports.
        transition: A function ``(p, x) -> x'`` instead of it.
        start: Where chains start.
        num_negatives: M, chains beside every datum.
        energy_penalty: alpha of the penalty on squared energies.
        max_gap: Magnitude of the mean of U(x) - U(x-) in nats that counts as diverged.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.
    """

    is_held_out_criterion = False
    why_not_frozen = (
        "with its negatives held the loss is unbounded below in the parameters. For Bayes freeze "
        "NCE or RankingNCE, use PseudoLikelihood or ScoreMatching, or the exchange kernels of "
        "pyro_ebm.mcmc"
    )

    def __init__(
        self,
        num_steps: int = 1,
        *,
        kernel: KernelFactory | None = None,
        transition: Transition | None = None,
        start: Start | Distribution = "data",
        num_negatives: int = 1,
        energy_penalty: float = 0.0,
        max_gap: float = 1e4,
        **elbo: Any,
    ) -> None:
        super().__init__(**elbo)
        self.num_steps = whole("num_steps", num_steps, least=1)
        self.num_negatives = whole("num_negatives", num_negatives, least=1)
        if not 0 <= energy_penalty < math.inf:
            raise ValueError(f"energy_penalty must not be negative, got {energy_penalty!r}")
        if not max_gap > 0:
            raise ValueError(f"max_gap must be positive (inf for no limit), got {max_gap!r}")
        if not isinstance(start, Distribution) and start not in ("data", "base"):
            raise ValueError(f"start must be 'data', 'base' or a distribution, got {start!r}")
        self.start = start
        self.energy_penalty = energy_penalty
        self.max_gap = max_gap
        who = type(self).__name__
        self.move = Mover(self.num_steps, kernel, transition, default=DEFAULT_KERNEL, user=who)

    @property
    def _where(self) -> str:
        return f"{type(self).__name__} at EBM site {self.evaluation.site!r}"

    # --- where chains start

    def starts_at_data(self, noise: Any) -> bool:
        """Whether chains start at the data: nothing else is given, by the guide or here."""
        return noise is None and self.start == "data"

    def fresh(self, p: EnergyDistribution, x: Tensor, noise: Any, num: int) -> Tensor:
        """Returns ``num`` starts beside every datum that are not the data.

        They are draws of the guide's law, of this objective's or of the base, else points spread
        over the support. Shape ``(num,) + x.shape``.
        """
        own = self.start if isinstance(self.start, Distribution) else p.base
        law, lead = (own if noise is None else noise), torch.Size((num,))
        if law is None:
            return initial_points(
                p.support, lead + rows_of(p, x), p.event_shape, dtype=x.dtype, device=x.device
            )
        law = contrast_law(law, p, x, needs_density=False, who=type(self).__name__)
        return law.sample(lead).to(x)

    # --- what chains did

    def watch(self, moved: Moved, **notes: Tensor) -> None:
        """Keeps diagnostics of the chains; says when they ran off.

        Raises:
            NonFiniteEnergyError: If more than half of them did.

        Warns:
            ApproximateSampleWarning: If any of them did.
        """
        if moved.acceptance is not None:
            notes["acceptance"] = moved.acceptance
        if moved.temperature is not None:
            notes["temperature"] = torch.tensor(moved.temperature)
        lost = moved.lost.double()
        self.evaluation.note(lost=lost, **notes)
        share = float(lost.mean())
        if share == 0:
            return
        sentence = (
            f"{self._where}: {share:.1%} of the chains ran off to where the energy is not finite "
            "(or started on the support's boundary) and were put back. Use a smaller step size, a "
            "confined energy, or a Metropolis kernel such as MALA"
        )
        if share > 0.5:
            raise NonFiniteEnergyError(sentence)
        warnings.warn(sentence, ApproximateSampleWarning, stacklevel=2)

    # --- the loss

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns U(x) - U(x-) and the penalty, in nats; not a likelihood.

        Raises:
            NonFiniteEnergyError: If the energies are not finite.
            DivergedTrainingError: If data and chains are further apart than ``max_gap``.
        """
        energy, potential = _energy_and_potential(p, contrast.with_data(x))
        difference = gap(potential)
        self.evaluation.note(energy_gap=difference)
        self._check_gap(difference.detach())
        self._check_acceptance()
        if not self.energy_penalty:
            return difference
        squares = energy.square()
        return difference + self.energy_penalty * (squares[0] + squares[1:].mean(0))

    def _check_gap(self, gap: Tensor) -> None:
        mean = float(self.evaluation.rows(gap, gap.dim()).mean())
        where = f"{self._where}, step {self.num_steps_taken}"
        if not math.isfinite(mean):
            raise NonFiniteEnergyError(
                f"{where}: the energies of data or chains are not finite. Look for overflow in the "
                "energy, standardize the data, or lower the learning rate"
            )
        if abs(mean) > self.max_gap:
            raise DivergedTrainingError(
                f"{where}: the mean of U(x) - U(x-) is {mean:.3g} nats, beyond max_gap="
                f"{self.max_gap:g}: training has diverged, or chains no longer follow the energy. "
                "Lower the learning rate, raise num_steps, set energy_penalty, or use spectral norm"
            )

    def _check_acceptance(self) -> None:
        """Warns if chains stay where they start: then nothing is learned however small the loss."""
        rate = self.evaluation.notes.get("acceptance")
        is_checked = self.is_checked_now(self.evaluation.site)
        if rate is None or float(rate) >= LEAST_ACCEPTANCE or not is_checked:
            return
        if self.num_steps_taken >= SETTLED:
            warnings.warn(
                f"{self._where}: the kernel accepts {float(rate):.2%} of its proposals, so that "
                "chains stay where they are and the gradient means little. Use a smaller step size",
                SurrogateWarning,
                stacklevel=2,
            )


def _energy_and_potential(p: EnergyDistribution, x: Tensor) -> tuple[Tensor, Tensor]:
    energy = p.energy(x)
    return energy, energy if p.base is None else energy - p.base.log_prob(x)
