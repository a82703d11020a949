r"""Recovery likelihood: a datum is to be recovered from a noised copy of it.

With :math:`\tilde x = x + \sigma z`, z standard normal, the conditional law

.. math::
    p(x \mid \tilde x) \propto \exp\big( {-U(x)} - \tfrac{1}{2 \sigma^2} |x - \tilde x|^2 \big)

is close to a Gaussian for small :math:`\sigma`, has one mode where U has many, and is easily
sampled by a short chain from :math:`\tilde x`. Its log likelihood is maximized by contrasting the
datum with draws of it:

.. math:: \ell(x) = U(x) - U(x^-), \qquad x^- \sim p(\cdot \mid \tilde x) \text{ held fixed}.

The *gradient* of this is that of :math:`-\log p(x \mid \tilde x)`; its *value* is not, hovers
around zero and must not be used to stop early. With exact draws the gradient is in expectation
that of energy discrepancy at :math:`t = \sigma^2` and :math:`M = \infty`, since

.. math:: -E \log p(x \mid \tilde x) = E\,U(x) - E\,U_\sigma(\tilde x) + \mathrm{const}, \qquad
    U_\sigma = -\log \int e^{-U(x)} N(\cdot\,; x, \sigma^2)\, dx .

As :math:`\sigma \to 0` it becomes score matching (times :math:`\sigma^2`), as :math:`\sigma \to
\infty` maximum likelihood by MCMC. It is consistent for every :math:`\sigma`, as far as the chains
have converged: theirs start at :math:`\tilde x`, so what is left of the start biases it. Along each
coordinate a step follows the width that the conditional has if the model is as wide as the data:
columns may be of any width.

On a constrained support noise and chains live in the unconstrained coordinates, and U there
includes the Jacobian. One derivative in x is taken, for the chains only, which accept and reject:
ReLUs do no harm.

References:
    Bengio, Yao, Alain, Vincent, Generalized denoising auto-encoders as generative models, NeurIPS
    2013, arXiv:1305.6663; Gao, Song, Poole, Wu, Kingma, Learning energy-based models by diffusion
    recovery likelihood, ICLR 2021, arXiv:2012.08125.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.score.score_objective import ScoreObjective
from pyro_ebm.infer.scoring.contrast import Contrast, gap
from pyro_ebm.infer.scoring.unconstrained import Unconstrained
from pyro_ebm.ops.arguments import positive, whole
from pyro_ebm.ops.short_langevin import Langevin
from pyro_ebm.ops.spaces import UnconstrainedSpace

Sampler = Callable[[EnergyDistribution, Tensor], Tensor]


class RecoveryLikelihood(ScoreObjective):
    r"""Maximum recovery likelihood.

    Args:
        noise_std: :math:`\sigma` in units of (unconstrained) x: large against the distance over
            which relative mass is to be seen, small enough for the chains.
        num_steps: Steps of each chain. Half of them tune one step size for all rows. The larger
            the noise is against the model's own scales, the more are needed: with too few the
            diagnostic ``accept_prob`` stays well below .5.
        num_negatives: M, noised copies per datum with a chain each.
        sampler: ``(conditional, start) -> draws`` in place of the Langevin chains. The conditional
            is an ``EnergyDistribution`` on the unconstrained coordinates with one row of its batch
            for every chain, and start holds the noised copies, ``batch + event``.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: On a support that is not continuous, or when it is to be frozen.
        ValueError: If an argument is out of range, the data are integers, or the guide holds a
            contrast.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=data)
        >>> objective = RecoveryLikelihood(1.0, num_steps=10)
        >>> optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98})
        >>> svi = SVI(model, lambda data: None, optim, loss=objective)
        >>> data = torch.randn(1000)
        >>> losses = [svi.step(data) for _ in range(150)]
        >>> abs(pyro.param("precision").item() - 1 / data.var().item()) < 0.2
        True
    """

    why_smooth = None
    is_held_out_criterion = False
    why_not_frozen = (
        "its negatives are drawn from the model at its present parameters, so that with the draws "
        "held there is no loss left. Freeze EnergyDiscrepancy(time=noise_std**2)"
    )

    def __init__(
        self,
        noise_std: float,
        num_steps: int = 20,
        num_negatives: int = 1,
        *,
        sampler: Sampler | None = None,
        **elbo: Any,
    ) -> None:
        super().__init__(**elbo)
        self.noise_std = positive("noise_std", noise_std)
        self.num_steps = whole("num_steps", num_steps, least=1)
        self.num_negatives = whole("num_negatives", num_negatives, least=1)
        self.sampler = sampler

    def draw_at(self, space: Unconstrained, u: Tensor) -> Contrast:
        """Draws negatives from the law of the datum given its noised copies.

        Raises:
            ValueError: If the sampler returns another shape.
        """
        z = torch.randn((self.num_negatives, *u.shape), dtype=u.dtype, device=u.device)
        start = u + self.noise_std * z
        law = self.conditional(space, start)
        if self.sampler is None:
            draws = self._chains(law, start, self._variances(space, u))
        else:
            draws = self.sampler(law, start)
        if draws.shape != start.shape:
            raise ValueError(
                f"the sampler of RecoveryLikelihood must return a draw for every start, shape "
                f"{tuple(start.shape)}, got {tuple(draws.shape)}"
            )
        return Contrast(draws.detach())

    def _variances(self, space: Unconstrained, u: Tensor) -> Tensor:
        r"""Returns the conditional's under a Gaussian as wide as the data, ``(1, D)``.

        :math:`(\sigma^{-2} + s_j^{-2})^{-1}` along coordinate j, :math:`\sigma^2` where nothing
        varies.
        """
        rows = self.evaluation.rows(u, len(space.rows(u)))
        spread = rows.reshape(len(rows), -1).var(0, correction=0, keepdim=True)
        precision = torch.where(spread > 0, 1 / spread, 0.0)
        return 1 / (precision + self.noise_std**-2)

    def _chains(self, law: EnergyDistribution, start: Tensor, variances: Tensor) -> Tensor:
        """Returns where Langevin chains from ``start`` end, after a step size common to all.

        Args:
            law: The conditional.
            start: Its noised copies, ``batch + event``.
            variances: Squared lengths of a step along each coordinate, up to a factor, ``(1, D)``.
        """
        rows, event = law.batch_shape, law.event_shape
        kernel = Langevin(UnconstrainedSpace.of(law.support, event), variance=variances)

        def potential(u: Tensor) -> Tensor:
            return law.potential(u.reshape(rows + event)).reshape(-1)

        point, num_tuning = kernel.start(potential, start.reshape(-1, *event)), self.num_steps // 2
        for step in range(self.num_steps):
            if step == num_tuning:
                kernel.freeze()
            point, accepted = kernel.step(potential, point, adapt=step < num_tuning)
        self.evaluation.note(accept_prob=accepted.reshape(rows))
        return kernel.events(point).reshape(rows + event)

    def conditional(self, space: Unconstrained, near: Tensor) -> EnergyDistribution:
        """Returns the law of coordinates given noised ones, one row for each."""

        def energy(u: Tensor) -> Tensor:
            squared = space.event_sum((u - near).square())
            return space.potential(u) + squared / (2 * self.noise_std**2)

        rows = space.rows(near)
        event = near.shape[len(rows) :]
        return EnergyDistribution(
            energy, event_shape=event, support=constraints.real, batch_shape=rows
        )

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns the potential of the datum less that of its negatives, in nats."""
        space = self.space(p)
        return gap(space.potential(contrast.with_data(space.coordinates(x))))
