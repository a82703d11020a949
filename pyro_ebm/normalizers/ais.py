r"""Log Z by annealed importance sampling, forward from the base and back from the law.

Along :math:`f_\beta = \mathrm{base}\, e^{-\beta E}` on a ladder :math:`0 = \beta_0 < \dots <
\beta_K = 1`, a chain that starts from the base gathers

.. math:: \log w = -\sum_k (\beta_k - \beta_{k-1})\, E(x_{k-1}),

moving by a kernel that keeps :math:`f_{\beta_k}` in between. The mean of w is unbiased for Z, so
that :math:`\log \hat Z` is a stochastic *lower* bound. A chain run backwards from a draw of the law
gathers the inverse, and minus the log of its mean is a stochastic *upper* bound, but only if that
draw was exact. Both together give Bennett's estimate, which is better than either.

The ladder and the kernel's tuning come from a pilot run of :class:`~pyro_ebm.mcmc.SMC` and are then
held, as unbiasedness asks. A mode that forward chains do not reach is missing from the lower bound,
and its standard error does not know.

References:
    Neal, Annealed importance sampling, Statistics and Computing 11, 2001; Grosse, Ghahramani,
    Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo, 2015,
    arXiv:1511.02543.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, SMC, Kernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.normalizers.annealed import annealed
from pyro_ebm.normalizers.laws import KernelMaker, based, check_draws
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.nan_energies import NaNCount

NUM_PILOTS = 256


def ais(
    dist: EnergyDistribution,
    *,
    num_chains: int = 200,
    num_rungs: int = 500,
    kernel: KernelMaker = HMC,
    draws: Tensor | None = None,
    draws_are_exact: bool = False,
) -> LogNormalizer:
    """Estimates log Z by annealing.

    Args:
        dist: A distribution with a base and ``batch_shape == ()``.
        num_chains: Chains; their weights are independent.
        num_rungs: K; one step of the kernel at each.
        kernel: Makes the kernel.
        draws: Draws of the law ``(N,) + event_shape``, to anneal back from; of a generalized EBM
            latents.
        draws_are_exact: Whether these are independent draws of the law itself. Draws of chains are
            not, and give no bound.

    Returns:
        ``LogNormalizer`` in nats. Forward only: ``lower`` is the value. With draws the value is
        Bennett's, and ``upper`` is there if they are exact.

    Raises:
        ValueError: If the distribution has no base or is a batch.
        NonFiniteEnergyError: If the energy is not finite where it must be.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> law = EnergyDistribution(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
        >>> print(ais(law, num_chains=200, num_rungs=20))  # doctest: +ELLIPSIS
        log Z = -0.3... ± 0.0... nats (ais, from the base, ESS ... of 200)
    """
    law = based(dist, "annealed importance sampling")
    path = Path.piloted(law, whole("num_rungs", num_rungs, least=2), kernel)
    forward = path.forward(whole("num_chains", num_chains, least=2))
    backward = None
    if draws is not None:
        backward = path.backward(path.target.position_of(check_draws(law, draws)))
    exact, seen = draws_are_exact, path.seen
    return annealed(forward, backward, start="base", law=law, exact=exact, seen=seen)


@dataclass
class Path:
    """A ladder with a tuned kernel at every rung.

    Args:
        target: The law at beta = 1.
        beta: The kernel's inverse temperature, moved in place, 0-d.
        kernel: A kernel bound to the law at ``beta``.
        ladder: Inverse temperatures after each rung, ``(K,)``, the last one 1.
        tunings: The kernel's tuning at each rung.
        seen: What energies were NaN on the way.
    """

    target: DistributionTarget
    beta: Tensor
    kernel: Kernel
    ladder: Tensor
    tunings: list[dict[str, Tensor]]
    seen: NaNCount = field(default_factory=NaNCount)

    def __post_init__(self) -> None:
        self._moving = CapturedPotential(self.kernel.bind())
        self._weighing = CapturedPotential(self.target)

    @classmethod
    def piloted(cls, law: EnergyDistribution, num_rungs: int, kernel: KernelMaker) -> Path:
        """Returns a path whose ladder is spaced as an adaptive run's, only finer."""
        pilot = SMC(law, NUM_PILOTS, kernel=kernel, disable_progbar=True)
        pilot.run()
        ladder, above = finer(pilot.plan.ladder, num_rungs)
        tunings = [pilot.plan.tunings[int(k)] for k in above]
        target = DistributionTarget(law)
        beta = target.draw_start(1).new_ones(())
        return cls(target, beta, kernel(target.law.temper(beta)), ladder, tunings)

    def forward(self, num_chains: int) -> Tensor:
        """Returns log weights of chains that start from the base, ``(N,)``."""
        q = self.target.draw_start(num_chains)
        log_weights = torch.zeros(num_chains, dtype=torch.float64, device=q.device)
        old = 0.0
        for k, new in enumerate(self.ladder.tolist()):
            log_weights = log_weights - (new - old) * self._energy(q)
            old = new
            if k < len(self.ladder) - 1:
                q = self._moved(q, k)
        return log_weights

    def backward(self, q: Tensor) -> Tensor:
        """Returns log weights of chains that start from draws of the law, ``(N,)``.

        Raises:
            NonFiniteEnergyError: If the energy is not finite at one of the draws.
        """
        if not bool(torch.isfinite(self._energy(q)).all()):
            raise NonFiniteEnergyError(f"{self.target!r}: the energy is not finite at a draw of it")
        log_weights = torch.zeros(len(q), dtype=torch.float64, device=q.device)
        betas = [0.0, *self.ladder.tolist()]
        for k in range(len(self.ladder), 0, -1):
            log_weights = log_weights + (betas[k] - betas[k - 1]) * self._energy(q)
            if k > 1:
                q = self._moved(q, k - 2)
        return log_weights

    def _energy(self, q: Tensor) -> Tensor:
        return self.seen(self._weighing.energy(q).double())

    def _moved(self, q: Tensor, rung: int) -> Tensor:
        """One step of the kernel at a rung."""
        self.beta.fill_(self.ladder[rung])
        state = self.kernel.init(self._moving, q).with_tuning(**self.tunings[rung])
        return self.kernel.step(self._moving, state)[0].position


def finer(ladder: Tensor, num_rungs: int) -> tuple[Tensor, Tensor]:
    """Returns rungs between those of a ladder that rises to 1, and which of its own is next above.

    In float64: with differences in single precision the last rung could be a rounding above 1.

    Example:
        >>> finer(torch.tensor([0.2, 1.0]), 4)[0].round(decimals=1).tolist()
        [0.1, 0.2, 0.6, 1.0]
    """
    rungs = torch.cat([ladder.new_zeros(1), ladder]).double()
    places = torch.linspace(0.0, len(ladder), num_rungs + 1, dtype=torch.float64)[1:].to(
        rungs.device
    )
    above = places.ceil().long().clamp(1, len(ladder))
    share = places - (above - 1)
    return rungs[above - 1] + share * (rungs[above] - rungs[above - 1]), above - 1
