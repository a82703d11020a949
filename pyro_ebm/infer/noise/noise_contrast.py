r"""The part of noise-contrastive estimation that is common to its losses: noise and log ratios.

Data are told from draws of a density :math:`q` by their log ratios to the model,

.. math:: S(x) = -U(x) - \log q(x),

taken at every datum and at the noise beside it in one call of the energy. The noise is the guide's
site of the same name, else the objective's own, else the base. A Gaussian may be fitted, to every
site by itself: to its first batch, and from time to time anew, to the batch at hand or to the
model, whose moments are estimated by importance sampling from the noise before.

The log ratios are exact for any noise that covers the data; how much is learned from them depends
on how near it is to them.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.scoring.contrast import (
    POSITIVE_AT_DATA,
    Contrast,
    contrast_law,
    fitted_gaussian,
    gaussian_at,
    gaussian_of,
    location_and_scale,
    rows_of,
)
from pyro_ebm.infer.scoring.latents import ENOUGH
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.ops.arguments import one_of
from pyro_ebm.ops.graph_recording import is_recording, require
from pyro_ebm.ops.log_space import effective_sample_size

Refit = Literal["data", "model"]
MIN_WEIGHTS = 10  # effective draws per entry of the fitted moments


class NoiseContrast(Objective):
    r"""What objectives share that compare every datum with draws of a noise density.

    Args:
        num_noise: :math:`\nu`, noise draws per datum.
        noise: A normalized distribution, ``"gaussian"`` for one fitted to every site's first batch,
            or ``None`` for the base.
        refit_every: Steps after which ``"gaussian"`` noise is fitted anew.
        refit_to: What it is then fitted to.
        **options: As for :class:`~pyro_ebm.infer.scoring.objective.Objective`.

    Raises:
        ValueError: If an argument is out of range, or there is no fitted noise to refit.
    """

    draws_noise = True

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
        if not isinstance(num_noise, (int, float)):
            raise TypeError(
                "num_noise is a number of noise points, and the distribution that they are drawn "
                f"from is noise=; got num_noise={num_noise!r}"
            )
        if not num_noise > 0:
            raise ValueError(f"num_noise must be positive, got {num_noise!r}")
        if isinstance(noise, str) and noise != "gaussian":
            raise ValueError(f"noise must be a distribution, 'gaussian' or None, got {noise!r}")
        if refit_every is not None and (refit_every < 1 or not isinstance(noise, str)):
            raise ValueError(
                "refit_every must be a positive number of steps, with noise='gaussian' to refit; "
                f"got refit_every={refit_every!r} and noise={noise!r}"
            )
        self.num_noise = num_noise
        self.counts_as_likelihood = num_noise >= ENOUGH
        self.noise = noise
        self.refit_every = refit_every
        self.refit_to = one_of("refit_to", refit_to, get_args(Refit))
        self._refitted_at: dict[str, int] = {}
        if refit_every is not None:
            self.is_held_out_criterion = False  # losses against other noise do not compare
            self.is_replayable = False

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws noise beside every datum: the guide's, this objective's own, or the base's.

        Raises:
            ValueError: If there is none at some data.
        """
        if noise is None:
            noise = self._own_noise(p, x)
        q = contrast_law(noise, p, x, needs_density=True, who=type(self).__name__)
        points = q.sample(torch.Size((math.ceil(self.num_noise),)))
        log_noise = q.log_prob(points)
        log_noise_data = q.log_prob(x.to(points.dtype))  # of counts and truth values too
        self._check_noise_at_data(log_noise_data)
        if not (self.has_second_player or self.refit_every):  # noise that follows the data
            self.evaluation.noise = lambda: (log_noise_data, log_noise)
        return Contrast(points, log_noise, log_noise_data)

    def _check_noise_at_data(self, log_noise_data: Tensor) -> None:
        """Raises ``ValueError`` for data without noise: told from it by an infinite log ratio.

        They would weigh nothing in the loss. Of a graph that is recorded it is a condition.
        """
        bare = log_noise_data == -math.inf
        if is_recording():
            require(~bare.any())
        elif bare.any():
            raise ValueError(
                f"EBM site {self.evaluation.site!r}: the log density of {type(self).__name__}'s "
                f"noise is -inf in {int(bare.sum())} of {bare.numel()} rows of the data, from "
                f"which nothing would be learned: give noise {POSITIVE_AT_DATA}"
            )

    def noise_of(self, site: str) -> Any:
        """Returns a site's noise where the guide holds none; ``None`` stands for the base.

        Raises:
            KeyError: If it is to be fitted, and the site was not evaluated yet.
        """
        return gaussian_at(*self.fitted[site]) if isinstance(self.noise, str) else self.noise

    def _own_noise(self, p: EnergyDistribution, x: Tensor) -> Any:
        site = self.evaluation.site
        if isinstance(self.noise, str) and site not in self.fitted:
            self.fitted[site] = location_and_scale(self._fitted_to_data(p, x))
        return self.noise_of(site)

    def _fitted_to_data(self, p: EnergyDistribution, x: Tensor) -> Any:
        rows = self.evaluation.rows(x, len(rows_of(p, x)))
        return fitted_gaussian(rows, len(p.event_shape))

    def site_loss(
        self, name: str, p: EnergyDistribution, x: Tensor, noise: Any, log_z: Tensor | None
    ) -> Tensor:
        """Returns the loss per datum in nats, its noise fitted anew where that is due."""
        if noise is None and torch.is_grad_enabled() and self._is_refit_due(name):
            self._refitted_at[name] = int(self.num_steps_taken)
            fit = self._fitted_to_data if self.refit_to == "data" else self._fitted_to_model
            self.fitted[name] = location_and_scale(fit(p, x))
        return super().site_loss(name, p, x, noise, log_z)

    def _is_refit_due(self, site: str) -> bool:
        step, last = int(self.num_steps_taken), self._refitted_at.get(site, 0)
        if not self.refit_every or site not in self.fitted:
            return False
        return step % self.refit_every == 0 and step > last  # once for all particles

    @torch.no_grad()
    def _fitted_to_model(self, p: EnergyDistribution, x: Tensor) -> Any:
        """A Gaussian with the model's moments, by importance sampling from the present noise."""
        old = self.noise_of(self.evaluation.site)
        q = contrast_law(old, p, x, needs_density=True, who=type(self).__name__)
        points = q.sample(torch.Size((math.ceil(self.num_noise),)))
        log_weights = (p.unnormalized_log_prob(points) - q.log_prob(points)).flatten()
        rows = points.reshape(len(log_weights), -1)
        dim = rows.shape[1]
        if effective_sample_size(log_weights) < MIN_WEIGHTS * (1 + dim):
            warnings.warn(
                f"{type(self).__name__}(refit_to='model') keeps its noise at step "
                f"{self.num_steps_taken}: its draws are worth too few of the model's to fit "
                f"{dim} coordinate(s). Give more noise per step, or refit_to='data'",
                SurrogateWarning,
                stacklevel=2,
            )
            return old
        weights = torch.softmax(log_weights, 0)
        spread = torch.cov(rows.T, correction=0, aweights=weights)
        return gaussian_of((weights @ rows).reshape(p.event_shape), spread)

    def log_ratios(self, p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor:
        """Returns -U - log q at data and contrast, ``(1 + M,) + rows``, in one energy call."""
        return self.evaluation.once("log_ratios", lambda: _log_ratios(p, x, contrast))


def _log_ratios(p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor:
    points = contrast.with_data(x)
    log_noise = torch.cat([contrast.log_noise_data.unsqueeze(0), contrast.log_noise])  # type: ignore[union-attr, list-item]
    return p.unnormalized_log_prob(points) - log_noise
