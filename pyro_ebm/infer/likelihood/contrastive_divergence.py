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

from typing import Any

from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.likelihood.negative_phase import NegativePhase
from pyro_ebm.infer.scoring.contrast import Contrast


class ContrastiveDivergence(NegativePhase):
    r"""CD-k, or short-run training where chains start elsewhere than at the data.

    Its value is not a likelihood (``is_held_out_criterion`` is false). Conditional models need
    nothing special: the chain of a row moves under the row's own energy.

    A guide site of the same name is taken as the law that chains start from, afresh at every step;
    with it, or with ``start="base"``, this is short-run training.

    Args:
        num_steps: k, steps or sweeps from the start.
        kernel: A kernel of :mod:`pyro_ebm.mcmc` for continuous supports, options bound, such as
            ``functools.partial(HMC, step_size=0.2)``; its step size is in unconstrained coordinates
            and is not tuned. By default MALA, whose step follows the width of the data in every
            coordinate and, while it is being trained, the acceptance; three steps of ten are
            shortened (:mod:`pyro_ebm.infer.likelihood.adapted_step`). Its state is saved with the
            objective's. Discrete supports are swept by Gibbs.
        transition: Instead of a kernel, a function ``(p, x) -> x'`` that leaves p invariant, called
            k times with events ``(M,) + sample + batch + event``.
        start: ``"data"``; ``"base"``, the base or, without one, points spread over the support,
            where it is continuous over two standard deviations of the data to either side; or a
            distribution.
        num_negatives: M, chains beside every datum, over which U(x-) is averaged.
        energy_penalty: :math:`\alpha` of :math:`\alpha (E(x)^2 + E(x^-)^2)`, per squared nat.
        max_gap: Magnitude of the mean of U(x) - U(x-) in nats that counts as diverged.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If an argument is out of range.

    Warns:
        SurrogateWarning: If for many steps hardly any proposal was accepted, chains hardly moved,
            or energies of data and chains ran apart (:mod:`pyro_ebm.infer.likelihood.chain_watch`).

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=data)
        >>> optimizer = pyro.optim.Adam({"lr": 0.05})
        >>> svi = SVI(model, lambda data: None, optimizer, loss=ContrastiveDivergence(5))
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
        moved = self.moved(p, x, begin)
        self.note(moved)
        return Contrast(moved.x)
