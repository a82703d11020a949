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
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.noise.noise_contrast import NoiseContrast
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.infer.scoring.degenerate import SETTLED
from pyro_ebm.ops.arguments import one_of, rate, whole
from pyro_ebm.ops.log_space import bennett

CUpdate = Literal["gradient", "closed_form"]

MIN_UNDECIDED = 10  # comparisons of a batch: the root varies by a third of a nat


class NCE(NoiseContrast):
    r"""Noise-contrastive estimation with a learned log Z.

    Args:
        num_noise: :math:`\nu`, noise draws per datum; a fraction weights the draws accordingly.
        noise: A normalized distribution on the EBM's support, ``"gaussian"`` for one fitted to the
            first batch, or ``None`` for the base. A guide site of the same name goes before both.
            It is never trained here: :class:`FlowContrastive` does.
        c_update: ``"gradient"`` makes log Z a parameter, ``"closed_form"`` solves Bennett's
            equation on every batch and averages the roots. Where noise is wider than the data that
            mean is too low, the more the roots scatter, and the energy follows it. On small batches
            take ``"gradient"``, which has no such error.
        c_rate: Weight of the newest batch in that average.
        refit_every: Steps after which ``"gaussian"`` noise is fitted anew; ``None`` never does.
        refit_to: What it is then fitted to: ``"data"``, the batch at hand, or ``"model"``, whose
            moments are estimated by importance sampling from the noise before.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: For a conditional energy without a log Z of its own, or noise on another
            support.

    Warns:
        SurrogateWarning: If Bennett's equation of a batch rests on few comparisons that are not
            decided, their number being the diagnostic ``undecided``.

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
        self.c_update = one_of("c_update", c_update, get_args(CUpdate))
        self.c_rate = rate("c_rate", c_rate)

    def pooled_by(self, site: str) -> str | None:
        """Says that Bennett's equation takes all rows of a site alike, or ``None``."""
        if self.learns_by_gradient or not self.keeps_log_normalizer(site):
            return None
        return 'finds log Z from all rows alike: use c_update="gradient", or RankingNCE'

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
        evaluation, num_noise = self.evaluation, self.num_noise
        data, noise = data.detach(), noise.detach()
        weights = noise_ratios - log_z  # of mean 1 if log Z is right, row by row

        def accuracy() -> Tensor:
            correct = (data > 0).double() + num_noise * (noise < 0).double().mean(0)
            return correct / (1 + num_noise)

        evaluation.note_weights("noise_ess", weights)
        evaluation.note(
            accuracy=accuracy, log_z=log_z, log_z_gap=lambda: -evaluation.log_mean_exp(weights)
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
        data, *each = (self.evaluation.rows(row, row.dim()) for row in ratios)
        noise = torch.cat(each)
        root = bennett(data, noise, ratio=self.num_noise)
        doubt = _doubt(data - root).mean() + self.num_noise * _doubt(noise - root).mean()
        self.evaluation.note(undecided=len(data) * doubt)
        log_z.lerp_(root, self.c_rate)

    def judge(self, site: str, notes: Mapping[str, Tensor], *, trains: bool) -> None:
        """Judges a step, and of steps that are checked what log Z rests on.

        Warns:
            SurrogateWarning: If it is fewer than ten comparisons.
        """
        super().judge(site, notes, trains=trains)
        step = int(self.num_steps_taken)
        is_due = trains and self.is_checked_now(site) and step >= SETTLED
        if is_due and float(notes.get("undecided", MIN_UNDECIDED)) < MIN_UNDECIDED:
            warnings.warn(
                f'{type(self).__name__}(c_update="closed_form") at EBM site {site!r}, step {step}: '
                f"Bennett's equation of a batch rests on {float(notes['undecided']):.1f} "
                "comparisons that are not decided, and the mean of its roots may be off: use "
                'c_update="gradient", larger batches or more noise, or noise closer to the data',
                SurrogateWarning,
                stacklevel=2,
            )


def _doubt(logits: Tensor) -> Tensor:
    """How undecided comparisons are: minus the slope of their share in the equation."""
    return torch.sigmoid(logits) * torch.sigmoid(-logits)


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
        super().__init__(whole("num_noise", num_noise, least=1), noise, **elbo)

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns the softmax loss of ranking a datum above its noise, in nats."""
        scores = self.log_ratios(p, x, contrast)
        held = scores.detach()
        self.evaluation.note(accuracy=lambda: (held[0] > held[1:].amax(0)).double())
        return torch.logsumexp(scores, 0) - scores[0]
