r"""The part of likelihood training by Markov chains that does not depend on where they start.

The gradient of :math:`-\log p` is :math:`E_d \nabla U - E_p \nabla U`. The second term, the
*negative phase*, is an expectation under the model itself; states of chains stand in for its draws:

.. math:: L = U(x) - U(x^-) + \alpha \big(E(x)^2 + E(x^-)^2\big), \qquad x^- \text{ held}.

The gradient is right as far as the chains have converged. The value is no likelihood: it hovers
around zero and may have either sign. Since it tells nothing, the chains are watched instead: how
many ran off or stay where they are, and whether their energies run apart from the data's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
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
from pyro_ebm.infer.likelihood.adapted_step import AdaptedStep
from pyro_ebm.infer.likelihood.chain_watch import ChainWatch
from pyro_ebm.infer.likelihood.transitions import KernelFactory, Moved, Mover, Transition
from pyro_ebm.infer.scoring.contrast import Contrast, contrast_law, gap, rows_of, where_to_look
from pyro_ebm.infer.scoring.latents import ENOUGH
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.initial_points import initial_points

Start = Literal["data", "base"]


class NegativePhase(Objective):
    """What objectives share that compare the data with states of Markov chains, held.

    Args:
        num_steps: k, steps of the kernel at every use.
        kernel: Makes the kernel on continuous supports; by default MALA whose step follows the data
            and the acceptance (:mod:`~pyro_ebm.infer.likelihood.adapted_step`).
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
        self.counts_as_likelihood = self.num_steps >= ENOUGH
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
        self.move = Mover(self.num_steps, kernel, transition, user=type(self).__name__)
        self.steps: dict[str, AdaptedStep] = {}
        self.watches: dict[str, ChainWatch] = {}

    # --- where chains start

    def starts_at_data(self, noise: Any) -> bool:
        """Whether chains start at the data: nothing else is given, by the guide or here."""
        return noise is None and self.start == "data"

    def fresh(self, p: EnergyDistribution, x: Tensor, noise: Any, num: int) -> Tensor:
        """Returns ``num`` starts beside every datum that are not the data.

        They are draws of the guide's law, of this objective's or of the base, else points spread
        over the support, where it is continuous over two standard deviations of the data to either
        side. Shape ``(num,) + x.shape``.
        """
        own = self.start if isinstance(self.start, Distribution) else p.base
        law, lead = (own if noise is None else noise), torch.Size((num,))
        if law is None:
            shape = lead + rows_of(p, x)
            points = initial_points(p.support, shape, p.event_shape, dtype=x.dtype, device=x.device)
            return self._step(p, x).spread(p, points) if _is_continuous(p) else points
        law = contrast_law(law, p, x, needs_density=False, who=type(self).__name__)
        return law.sample(lead).to(x)

    # --- how they move

    def moved(self, p: EnergyDistribution, x: Tensor, start: Tensor) -> Moved:
        """Returns where chains are that start at ``start``, beside the data ``x``."""
        moved = self._by_default(p, x, start) if self.move.takes_default(p) else self.move(p, start)
        if _is_continuous(p):
            self._note_move(p, x, moved.x - start)
        return moved

    def _by_default(self, p: EnergyDistribution, x: Tensor, start: Tensor) -> Moved:
        """Moves by the adapted step, and adapts it, in training alone."""
        step = self._step(p, x)
        self.evaluation.note(step_size=step.share.clone())
        moved = self.move(p, start, step.kernel)
        if self.evaluation.has_graph and moved.acceptance is not None:
            step.adapt(moved.acceptance)
        return moved

    def _note_move(self, p: EnergyDistribution, x: Tensor, moves: Tensor) -> None:
        """How far chains moved, root mean square, in standard deviations of the batch."""
        rows = self.evaluation.rows(x, len(rows_of(p, x)))
        width = rows.std(0, correction=0)
        varies = width > 0
        squares = torch.where(varies, moves / width, 0.0).square()
        mean = squares.mean() * (varies.numel() / varies.sum())  # NaN where nothing varies
        self.evaluation.note(moved=mean.sqrt())

    def _step(self, p: EnergyDistribution, x: Tensor) -> AdaptedStep:
        """The site's step, which has seen this batch; one of its own for a batch held out."""
        return self.evaluation.once("step", lambda: self._seen_step(p, x))

    def _seen_step(self, p: EnergyDistribution, x: Tensor) -> AdaptedStep:
        site, trains = self.evaluation.site, self.evaluation.has_graph
        step = self.steps.get(site) or AdaptedStep()
        if trains:
            self.steps[site] = step
        if trains or not int(step.num_rows):
            step.see(p, self.evaluation.rows(x, len(rows_of(p, x))))
        return step

    # --- what chains did

    def note(self, moved: Moved, **notes: Tensor) -> None:
        """Keeps diagnostics of the chains, by which :meth:`judge` judges the step."""
        if moved.acceptance is not None:
            notes["acceptance"] = moved.acceptance
        if moved.temperature is not None:
            notes["temperature"] = torch.tensor(moved.temperature)
        self.evaluation.note(lost=moved.lost.double(), **notes)

    def judge(self, site: str, notes: Mapping[str, Tensor], *, trains: bool) -> None:
        """Says when chains ran off, lost the data, or have been of no use for many steps.

        Raises:
            NonFiniteEnergyError: If more than half of them ran off, or energies are not finite.
            DivergedTrainingError: If data and chains are further apart than ``max_gap``.

        Warns:
            ApproximateSampleWarning: If some of them ran off.
            SurrogateWarning: If they hardly move, are hardly accepted, or fall behind ever more, or
                if some that persist do not move at all.
        """
        where = f"{type(self).__name__} at EBM site {site!r}"
        values = {name: float(value) for name, value in notes.items()}
        _check_lost(values.get("lost", 0.0), where)
        self._check_gap(values["energy_gap"], f"{where}, step {self.num_steps_taken}", site)
        if trains:
            watch = self.watches.setdefault(site, ChainWatch())
            watch.see(values)
            for sentence in watch.verdicts(int(self.num_steps_taken)):
                warnings.warn(f"{where}, {sentence}", SurrogateWarning, stacklevel=2)

    def _check_gap(self, gap: float, where: str, site: str) -> None:
        if not math.isfinite(gap):
            raise NonFiniteEnergyError(
                f"{where}: the energies of data or chains are not finite. "
                + where_to_look(self.sites[site], self.examples[site])
            )
        if abs(gap) > self.max_gap:
            raise DivergedTrainingError(
                f"{where}: the mean of U(x) - U(x-) is {gap:.3g} nats, beyond max_gap="
                f"{self.max_gap:g}: training has diverged, or chains no longer follow the energy. "
                "Lower the learning rate, raise num_steps, set energy_penalty, or use spectral norm"
            )

    # --- the loss

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns U(x) - U(x-) and the penalty, in nats; not a likelihood."""
        energy, potential = _energy_and_potential(p, contrast.with_data(x))
        difference = gap(potential)
        data = self.evaluation.rows(potential[0].detach(), potential.dim() - 1)
        self.evaluation.note(energy_gap=difference, energy_spread=data.std(correction=0))
        if not self.energy_penalty:
            return difference
        squares = energy.square()
        return difference + self.energy_penalty * (squares[0] + squares[1:].mean(0))

    # --- saving

    def get_extra_state(self) -> Any:
        """Returns steps and watches of every site, which are part of the state."""
        own = {"steps": _saved(self.steps), "watches": _saved(self.watches)}
        return {"fitted": super().get_extra_state(), **own}

    def set_extra_state(self, state: Any) -> None:
        """Restores them."""
        super().set_extra_state(state["fitted"])
        self.steps = {site: self.steps.get(site, AdaptedStep()) for site in state["steps"]}
        for site, saved in state["steps"].items():
            self.steps[site].load(**saved)
        self.watches = {site: ChainWatch(**saved) for site, saved in state["watches"].items()}


def _check_lost(share: float, where: str) -> None:
    if share == 0:
        return
    sentence = (
        f"{where}: {share:.1%} of the chains ran off to where the energy is not finite (or started "
        "on the support's boundary) and were put back. Use a smaller step size, a confined energy, "
        "or a Metropolis kernel such as MALA"
    )
    if share > 0.5:
        raise NonFiniteEnergyError(sentence)
    warnings.warn(sentence, ApproximateSampleWarning, stacklevel=3)


def _saved(by_site: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {site: deepcopy(vars(one)) for site, one in by_site.items()}


def _is_continuous(p: EnergyDistribution) -> bool:
    return p.base_measure == "lebesgue"


def _energy_and_potential(p: EnergyDistribution, x: Tensor) -> tuple[Tensor, Tensor]:
    energy = p.energy(x)
    return energy, energy if p.base is None else energy - p.base.log_prob(x)
