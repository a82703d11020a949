r"""Noise-contrastive estimation: learning energy and log Z by telling data from noise.

With noise density :math:`q`, :math:`\nu` noise draws per datum and :math:`c` for :math:`\log Z`,

.. math::
    s(x) = -U(x) - c - \log q(x) - \log\nu, \qquad
    L = E_d\, \mathrm{softplus}(-s(x)) + \nu\, E_q\, \mathrm{softplus}(s(y)).

Both the energy and c are identified: at the optimum :math:`c = \log Z`, and for data from the model
:math:`\partial L/\partial c = 0` is Bennett's acceptance ratio equation. As :math:`\nu \to \infty`
the gradient becomes the likelihood's. If noise is told from data almost perfectly (accuracy near 1)
nothing is learned however small the loss.

Noise may change while the energy learns: c is log Z of the energy, whatever the noise, so it is
kept as it is and only :math:`\log q` follows.

Gutmann and Hyvärinen, Noise-contrastive estimation of unnormalized statistical models, JMLR 13,
2012; Ma and Collins, Noise contrastive estimation and negative sampling for conditional models,
EMNLP 2018, arXiv:1809.01812.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import checks
from pyro_ebm.infer.contrast import (
    Contrast,
    contrast_law,
    fitted_gaussian,
    gaussian_of,
    rows_of,
)
from pyro_ebm.infer.objective import Objective
from pyro_ebm.ops.log_space import bennett, effective_sample_size

CUpdate = Literal["gradient", "closed_form"]
Refit = Literal["data", "model"]
FEWEST_WEIGHTS = 10  # effective draws per entry of the fitted moments


class NoiseContrast(Objective):
    """What objectives share that compare every datum with draws of a noise density."""

    is_held_out_criterion = True

    def __init__(
        self,
        num_noise: float,
        noise: Any,
        *,
        refit_every: int | None = None,
        refit_to: Refit = "data",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(num_noise, (int, float)) or not num_noise > 0:
            raise ValueError(f"num_noise must be positive, got {num_noise!r}")
        if isinstance(noise, str) and noise != "gaussian":
            raise ValueError(f"noise must be a distribution, 'gaussian' or None, got {noise!r}")
        if refit_to not in ("data", "model"):
            raise ValueError(f"refit_to must be 'data' or 'model', got {refit_to!r}")
        if refit_every is not None and (refit_every < 1 or not isinstance(noise, str)):
            raise ValueError(
                "refit_every must be a positive number of steps, with noise='gaussian' to refit; "
                f"got refit_every={refit_every!r} and noise={noise!r}"
            )
        self.num_noise = num_noise
        self.noise = noise
        self.refit_every = refit_every
        self.refit_to = refit_to
        self._fits_noise = isinstance(noise, str)
        self._refitted_at = 0
        if refit_every is not None:
            self.is_held_out_criterion = False  # losses against other noise do not compare

    @property
    def is_replayable(self) -> bool:  # type: ignore[override]
        """Whether noise stays what it is."""
        return not self.refit_every

    def get_extra_state(self) -> Any:
        """Returns the moments of fitted noise, which belong to the state as the parameters do."""
        fitted = self._fits_noise and not isinstance(self.noise, str)
        if not fitted:
            return None
        of_numbers = isinstance(self.noise, Normal)
        spread = self.noise.variance if of_numbers else self.noise.covariance_matrix
        return (self.noise.loc, spread)

    def set_extra_state(self, state: Any) -> None:
        """Restores fitted noise."""
        if state is not None:
            self.noise = gaussian_of(*state)

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws noise beside every datum: the guide's, this objective's own, or the base's."""
        if noise is None:
            noise = self._own_noise(p, x)
        q = contrast_law(noise, p, x, needs_density=True, who=type(self).__name__)
        points = q.sample(torch.Size((math.ceil(self.num_noise),)))
        return Contrast(points, q.log_prob(points), q.log_prob(x))

    def _own_noise(self, p: EnergyDistribution, x: Tensor) -> Any:
        if isinstance(self.noise, str):
            self.noise = self._fitted_to_data(p, x)
        return self.noise

    def _fitted_to_data(self, p: EnergyDistribution, x: Tensor) -> Any:
        rows = self.evaluation.rows(x, len(rows_of(p, x)))
        return fitted_gaussian(rows, len(p.event_shape))

    def _loss(
        self, name: str, p: EnergyDistribution, x: Tensor, noise: Any, log_z: Tensor | None
    ) -> Tensor:
        if noise is None and torch.is_grad_enabled() and self._is_refit_due():
            self._refitted_at = int(self.num_steps_taken)
            fit = self._fitted_to_data if self.refit_to == "data" else self._fitted_to_model
            self.noise = fit(p, x)
        return super()._loss(name, p, x, noise, log_z)

    def _is_refit_due(self) -> bool:
        step = int(self.num_steps_taken)  # once in a step, whatever the number of sites
        return bool(self.refit_every and step % self.refit_every == 0 and step > self._refitted_at)

    @torch.no_grad()
    def _fitted_to_model(self, p: EnergyDistribution, x: Tensor) -> Any:
        """A Gaussian with the model's moments, by importance sampling from the present noise."""
        q = contrast_law(self.noise, p, x, needs_density=True, who=type(self).__name__)
        points = q.sample(torch.Size((math.ceil(self.num_noise),)))
        log_weights = (p.unnormalized_log_prob(points) - q.log_prob(points)).flatten()
        rows = points.reshape(len(log_weights), -1)
        dim = rows.shape[1]
        if effective_sample_size(log_weights) < FEWEST_WEIGHTS * (1 + dim):
            warnings.warn(
                f"{type(self).__name__}(refit_to='model') keeps its noise at step "
                f"{self._refitted_at}: its draws are worth too few of the model's to fit "
                f"{dim} coordinate(s). Give more noise per step, or refit_to='data'",
                SurrogateWarning,
                stacklevel=2,
            )
            return self.noise
        weights = torch.softmax(log_weights, 0)
        spread = torch.cov(rows.T, correction=0, aweights=weights)
        return gaussian_of((weights @ rows).reshape(p.event_shape), spread)

    def log_ratios(self, p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor:
        """Returns -U - log q at data and contrast, ``(1 + M,) + rows``, in one energy call."""
        return self.evaluation.once("log_ratios", lambda: _log_ratios(p, x, contrast))


def _log_ratios(p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor:
    points = torch.cat([x.unsqueeze(0), contrast.points])
    log_noise = torch.cat([contrast.log_noise_data.unsqueeze(0), contrast.log_noise])  # type: ignore[union-attr, list-item]
    return p.unnormalized_log_prob(points) - log_noise


class NCE(NoiseContrast):
    r"""Noise-contrastive estimation with a learned log Z.

    Args:
        num_noise: :math:`\nu`, noise draws per datum; a fraction weights the draws accordingly.
        noise: A normalized distribution on the EBM's support, ``"gaussian"`` for one fitted to the
            first batch, or ``None`` for the base. A guide site of the same name goes before both.
            It is never trained here: :class:`FlowContrastive` does.
        c_update: ``"gradient"`` makes log Z a parameter, ``"closed_form"`` solves Bennett's
            equation on every batch and averages.
        c_rate: Weight of the newest batch in that average.
        refit_every: Steps after which ``"gaussian"`` noise is fitted anew; ``None`` never does.
        refit_to: What it is then fitted to: ``"data"``, the batch at hand, or ``"model"``, whose
            moments are estimated by importance sampling from the noise before.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: For a conditional energy without a log Z of its own, or noise on another
            support.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=data)
        >>> nce = NCE(num_noise=5, noise=dist.Normal(0.0, 1.5))
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.05}), loss=nce)
        >>> data = torch.randn(500)
        >>> losses = [svi.step(data) for _ in range(200)]
        >>> abs(pyro.param("precision").item() - 1 / data.var().item()) < 0.2
        True
    """

    learns_log_normalizer = True

    def __init__(
        self,
        num_noise: float = 10,
        noise: Any = None,
        *,
        c_update: CUpdate = "gradient",
        c_rate: float = 0.1,
        **elbo: Any,
    ) -> None:
        super().__init__(num_noise, noise, **elbo)
        if c_update not in ("gradient", "closed_form"):
            raise ValueError(f"c_update must be 'gradient' or 'closed_form', got {c_update!r}")
        self.c_update = c_update
        self.c_rate = checks.rate("c_rate", c_rate)

    @property
    def learns_by_gradient(self) -> bool:
        """Whether log Z is a parameter for the optimizer."""
        return self.c_update == "gradient"

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns the logistic loss of a datum and its noise, in nats."""
        ratios = self.log_ratios(p, x, contrast)
        logits = ratios - log_z - math.log(self.num_noise)
        data, noise = logits[0], logits[1:]
        self._diagnose(data, noise, ratios[1:], log_z)
        return softplus(-data) + self.num_noise * softplus(noise).mean(0)

    @torch.no_grad()
    def _diagnose(self, data: Tensor, noise: Tensor, noise_ratios: Tensor, log_z: Tensor) -> None:
        correct = (data > 0).double() + self.num_noise * (noise < 0).double().mean(0)
        weights = noise_ratios - log_z  # of mean 1 if log Z is right, row by row
        self.evaluation.note(
            accuracy=correct / (1 + self.num_noise),
            noise_ess=self.evaluation.relative_ess(weights),
            log_z=log_z,
            log_z_gap=-self.evaluation.log_mean_exp(weights),
        )

    def initial_log_normalizer(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast
    ) -> Tensor:
        """Returns the importance sampling estimate of log Z from the noise."""
        return self.evaluation.log_mean_exp(self.log_ratios(p, x, contrast)[1:])

    def update_log_normalizer(
        self, log_z: Tensor, p: EnergyDistribution, x: Tensor, contrast: Contrast
    ) -> None:
        """Moves log Z towards the root of Bennett's equation on this batch."""
        ratios = self.log_ratios(p, x, contrast).detach() - math.log(self.num_noise)
        data, *noise = (self.evaluation.rows(row, row.dim()) for row in ratios)
        log_z.lerp_(bennett(data, torch.cat(noise), ratio=self.num_noise), self.c_rate)


class RankingNCE(NoiseContrast):
    r"""Ranking NCE (InfoNCE): which of one datum and K noise draws is the datum?

    .. math:: L = \log\sum_{k=0}^{K} e^{S_k} - S_0, \qquad S = -U - \log q

    log Z cancels, so conditional models are learned consistently for every :math:`K \ge 1`.
    ``log(K + 1) - L`` bounds a Kullback–Leibler divergence from below and cannot exceed ``log(K +
    1)``.

    Args:
        num_noise: K, noise draws per datum.
        noise: As for :class:`NCE`, and so ``refit_every`` and ``refit_to``.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Example:
        >>> RankingNCE(num_noise=4).learns_log_normalizer
        False
    """

    def __init__(self, num_noise: int = 10, noise: Any = None, **elbo: Any) -> None:
        super().__init__(num_noise, noise, **elbo)
        if num_noise != int(num_noise):
            raise ValueError(f"num_noise must be a whole number of draws, got {num_noise!r}")

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns the softmax loss of ranking a datum above its noise, in nats."""
        scores = self.log_ratios(p, x, contrast)
        self.evaluation.note(accuracy=(scores[0] > scores[1:].amax(0)).double())
        return torch.logsumexp(scores, 0) - scores[0]
