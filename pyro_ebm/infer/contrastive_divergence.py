r"""Contrastive divergence: the likelihood's gradient with states of a short chain for model draws.

With :math:`p = e^{-U}/Z` the negative log-likelihood has the gradient :math:`E_d \nabla U - E_p
\nabla U`, and so has

.. math:: L = U(x) - U(x^-), \qquad x^- \sim p,

with :math:`x^-` held. Its *value* is not the likelihood: it hovers around zero at the optimum, may
have either sign, and must neither stop a fit nor rank models. Here :math:`x^-` is the state after k
steps of a kernel that leaves p invariant. Where the chain starts decides what is learned.

- At the data, CD-k: L descends :math:`KL(p_d \| p) - KL(T^k p_d \| p)`, up to a term that is
  dropped. As k grows it becomes maximum likelihood; CD-1 with a kernel that is reversible is energy
  discrepancy with that kernel. At small k mass far from the data goes unseen.
- At a base or at noise, *short-run*: unless k is long enough to forget the start, the k-step
  sampler is what is trained to give the data, and the energy is no calibrated density: do not
  report its likelihood.

The energy penalty :math:`\alpha (E(x)^2 + E(x^-)^2)` keeps energies near zero, where their free
constant lets them drift. It is on E rather than U: with a base it leaves that base alone and does
not depend on the units of x. It biases the density: keep :math:`\alpha` small where densities
matter.

References:
    Hinton, Training products of experts by minimizing contrastive divergence, Neural Computation
    14, 2002; Nijkamp et al., Learning non-convergent non-persistent short-run MCMC toward
    energy-based model, 2019, arXiv:1904.09770; Du, Mordatch, Implicit generation and modeling with
    energy-based models, 2019, arXiv:1903.08689 (the penalty).
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import ApproximateSampleWarning, NonFiniteEnergyError, SurrogateWarning
from pyro_ebm.infer.checks import SETTLED
from pyro_ebm.infer.contrast import Contrast, contrast_law, rows_of
from pyro_ebm.infer.objective import Objective
from pyro_ebm.infer.transitions import KernelFactory, Moved, Mover, Transition
from pyro_ebm.mcmc.checks import whole
from pyro_ebm.mcmc.mala import MALA
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
        self._site = ""

    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **options: Any) -> Tensor:
        """Returns minus the loss per datum of an EBM site, shape ``sample + batch`` of ``x``."""
        self._site = name
        return super().site_log_prob(name, p, x, **options)

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
            f"{type(self).__name__} at EBM site {self._site!r}: {share:.1%} of the chains ran off "
            "to where the energy is not finite (or started on the support's boundary) and were put "
            "back. Use a smaller step size, a confined energy, or a Metropolis kernel such as MALA"
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
            RuntimeError: If data and chains are further apart than ``max_gap``.
        """
        energy, potential = _energy_and_potential(p, torch.cat([x.unsqueeze(0), contrast.points]))
        gap = potential[0] - potential[1:].mean(0)
        self.evaluation.note(energy_gap=gap)
        self._check_gap(gap.detach())
        self._check_acceptance()
        if not self.energy_penalty:
            return gap
        squares = energy.square()
        return gap + self.energy_penalty * (squares[0] + squares[1:].mean(0))

    def _check_gap(self, gap: Tensor) -> None:
        mean = float(self.evaluation.rows(gap, gap.dim()).mean())
        where = f"{type(self).__name__} at EBM site {self._site!r}, step {self.num_steps_taken}"
        if not math.isfinite(mean):
            raise NonFiniteEnergyError(
                f"{where}: the energies of data or chains are not finite. Look for overflow in the "
                "energy, standardize the data, or lower the learning rate"
            )
        if abs(mean) > self.max_gap:
            raise RuntimeError(
                f"{where}: the mean of U(x) - U(x-) is {mean:.3g} nats, beyond max_gap="
                f"{self.max_gap:g}: training has diverged, or chains no longer follow the energy. "
                "Lower the learning rate, raise num_steps, set energy_penalty, or use spectral norm"
            )

    def _check_acceptance(self) -> None:
        """Warns if chains stay where they start: then nothing is learned however small the loss."""
        rate = self.evaluation.notes.get("acceptance")
        if rate is None or float(rate) >= LEAST_ACCEPTANCE or not self.is_checked_now(self._site):
            return
        if self.num_steps_taken >= SETTLED:
            warnings.warn(
                f"{type(self).__name__} at EBM site {self._site!r}: the kernel accepts "
                f"{float(rate):.2%} of its proposals, so that chains stay where they are and the "
                "gradient means little. Use a smaller step size",
                SurrogateWarning,
                stacklevel=2,
            )

    def freeze(self, model: Any, *args: Any, guide: Any = None, **kwargs: Any) -> NoReturn:
        """Raises: with its negatives held, U(x) - U(x-) is unbounded and no posterior.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no frozen form: with its negatives held the loss is "
            "unbounded below in the parameters. For Bayes freeze NCE or RankingNCE, use "
            "PseudoLikelihood or ScoreMatching, or the exchange kernels of pyro_ebm.mcmc"
        )


class ContrastiveDivergence(NegativePhase):
    r"""CD-k, or short-run training where chains start elsewhere than at the data.

    Its value is not a likelihood (``is_held_out_criterion`` is false). Conditional models need
    nothing special: the chain of a row moves under the row's own energy.

    A guide site of the same name is taken as the law that chains start from, afresh at every step;
    with it, or with ``start="base"``, this is short-run training.

    Args:
        num_steps: k, steps or sweeps from the start.
        kernel: A kernel of :mod:`pyro_ebm.mcmc` for continuous supports, options bound, such as
            ``functools.partial(HMC, step_size=0.2)``; step sizes are in unconstrained coordinates
            and are not tuned. MALA with step size 0.1 by default, which suits standardized data.
            Discrete supports are swept by Gibbs.
        transition: Instead of a kernel, a function ``(p, x) -> x'`` that leaves p invariant, called
            k times with events ``(M,) + sample + batch + event``.
        start: ``"data"``; ``"base"``, the base or, without one, points spread over the support; or
            a distribution.
        num_negatives: M, chains beside every datum, over which U(x-) is averaged.
        energy_penalty: :math:`\alpha` of :math:`\alpha (E(x)^2 + E(x^-)^2)`, per squared nat.
        max_gap: Magnitude of the mean of U(x) - U(x-) in nats that counts as diverged.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=data)
        >>> objective = ContrastiveDivergence(5, kernel=partial(MALA, step_size=0.5))
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.05}), loss=objective)
        >>> data = torch.randn(1000)
        >>> losses = [svi.step(data) for _ in range(150)]
        >>> abs(pyro.param("precision").item() - 1 / data.var().item()) < 0.2
        True
    """

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Moves M chains beside every datum from where they start."""
        if self.starts_at_data(noise):
            begin = x.expand((self.num_negatives,) + x.shape)
        else:
            begin = self.fresh(p, x, noise, self.num_negatives)
        moved = self.move(p, begin)
        self.watch(moved)
        return Contrast(moved.x)


def _energy_and_potential(p: EnergyDistribution, x: Tensor) -> tuple[Tensor, Tensor]:
    energy = p.energy(x)
    return energy, energy if p.base is None else energy - p.base.log_prob(x)
