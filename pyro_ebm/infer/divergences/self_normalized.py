r"""Self-normalized likelihood: maximum likelihood with log Z as one more parameter.

.. math::
    L = E_d[U(x) + b] + E_q\, e^{-U(y) - b - \log q(y)} - 1

is linear in the likelihood, with an unbiased gradient for any number of draws from the proposal
:math:`q`; it is least at :math:`b = \log Z`, where it equals :math:`E_d\, U + \log Z`, and bounds
that from above elsewhere. In other words: KALE with an importance proposal, relative to Lebesgue or
counting measure instead of a base. Its price is the variance of the weights: the proposal must
cover the model, with tails at least as heavy.

References:
    Self-normalized log-likelihood of unnormalized models, 2025, arXiv:2503.07021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.divergences.kale import KALE, CUpdate
from pyro_ebm.infer.scoring.contrast import Contrast, contrast_law
from pyro_ebm.ops.arguments import whole


class SelfNormalized(KALE):
    r"""The self-normalized likelihood.

    Minus its value on held-out data estimates a lower bound on their mean log density, as long as
    log Z is held too.

    Args:
        num_noise: Draws of the proposal per datum, pooled over the rows of a batch.
        noise: The proposal, a normalized distribution on the EBM's support; ``None`` takes the
            base. A guide site of the same name goes before both. It is never trained here.
        c_update: How log Z moves, as for :class:`KALE`.
        c_rate: Weight of the newest batch, in (0, 1].
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: For a conditional energy without a log Z of its own, or a proposal on another
            support.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=data)
        >>> objective = SelfNormalized(num_noise=5, noise=dist.Normal(0.0, 1.5))
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.05}), loss=objective)
        >>> data = torch.randn(1000)
        >>> losses = [svi.step(data) for _ in range(200)]
        >>> abs(pyro.param("precision").item() - 1 / data.var().item()) < 0.2
        True
    """

    needs_density = True
    has_second_player = False
    draws_noise = True

    def __init__(
        self,
        num_noise: int = 10,
        noise: Any = None,
        *,
        c_update: CUpdate = "closed_form",
        c_rate: float = 0.1,
        **elbo: Any,
    ) -> None:
        super().__init__(c_update=c_update, c_rate=c_rate, **elbo)
        self.num_noise = whole("num_noise", num_noise, least=1)
        self.noise = noise

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws the proposal beside every datum, with its density."""
        law = self.noise if noise is None else noise
        q = contrast_law(law, p, x, needs_density=True, who=type(self).__name__)
        points = q.sample(torch.Size((self.num_noise,)))
        log_noise = q.log_prob(points)
        self.evaluation.noise = lambda: (q.log_prob(x.to(points.dtype)), log_noise)
        return Contrast(points, log_noise)
