r"""Denoising score matching: the score of noised data, by one derivative.

With :math:`\tilde x = x + \sigma z`, z standard normal, and :math:`s = -\nabla U`,

.. math:: J_\sigma = \tfrac12 E \Big| \frac z\sigma + s(\tilde x) \Big|^2
    = \tfrac12 E\, |s(\tilde x) - \nabla \log q_\sigma(\tilde x)|^2 + \mathrm{const}, \qquad
    q_\sigma = p_{data} * N(0, \sigma^2).

**The law that is learned is** :math:`q_\sigma`, the data's law blurred by the noise, not the data's
own: for data :math:`N(0, \sigma_d^2)` the variance comes out as :math:`\sigma_d^2 + \sigma^2`. On a
constrained support, noise, scores and blurring are meant in the unconstrained coordinates.

**Small noise.** Of :math:`\tfrac12 |z / \sigma|^2 + z \cdot s(\tilde x) / \sigma + \tfrac12
|s(\tilde x)|^2` the first two terms blow up as :math:`\sigma \to 0` while what they say of s stays
bounded. The control variate takes away :math:`\tfrac12 |z / \sigma|^2 - d / 2 \sigma^2` and
:math:`z \cdot s(x) / \sigma`, both of mean zero given x: expectation and minimizer stay, the
variance stays bounded, at the price of a second score. In the limit it is score matching with a
Gaussian probe, plus :math:`d / 2 \sigma^2`.

**Several levels.** A level is drawn for every noise draw, all equally often, so that the loss
estimates the mean of :math:`\sigma^2 J_\sigma` over levels. Every level has a law of its own, and
the energy must know the level. An ``EnergyDistribution`` calls its energy with x alone, so the
energy takes the level as a keyword with a default, ``energy(x, noise_std=0.01)``: as it stands in
the model it is the law at the default level, and the objective asks for others. Otherwise one
energy serves all levels as :math:`U / \sigma`, U the potential in unconstrained coordinates: **then
the model's own site is the law at no level**, and draws and densities of it are at another
temperature. In both cases :meth:`DenoisingScoreMatching.law` returns what was learned at a level.

**ReLUs.** The identity above needs no derivative of s, so values are right also for an energy whose
slope jumps. Gradients are not: moving a kink changes the expectation, but the slope at no fixed
point, so that a bias would never learn. Such energies are refused.

References:
    Vincent, A connection between score matching and denoising autoencoders, Neural Computation 23,
    2011; Song, Ermon, Generative modeling by estimating gradients of the data distribution, NeurIPS
    2019, arXiv:1907.05600; Song, Ermon, Improved techniques for training score-based generative
    models, NeurIPS 2020, arXiv:2006.09011 (the energy over the level); Wang, Cheng, Li, Zhu, Zhang,
    A Wasserstein minimum velocity approach to learning unnormalized models, AISTATS 2020,
    arXiv:2002.07501 (control variates).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.score.score_objective import ScoreObjective
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.infer.scoring.unconstrained import Unconstrained
from pyro_ebm.ops.arguments import positive, whole
from pyro_ebm.typing import EnergyFn

Conditioning = Literal["none", "argument", "scale"]
Weighting = Literal["uniform", "variance"]


class Noise(NamedTuple):
    """Noise beside a batch.

    Args:
        z: Standard normal draws, ``(M,) + rows + event`` in unconstrained coordinates.
        noise_std: Their levels, ``(M,) + rows``.
    """

    z: Tensor
    noise_std: Tensor


def geometric_levels(smallest: float, largest: float, num_levels: int) -> tuple[float, ...]:
    """Returns noise levels with a constant ratio, ascending.

    Customary are a hundredth of the data's standard deviation as the smallest, the median distance
    of two data as the largest, and a ratio of 1.1 to 1.4.

    Args:
        smallest: The first level, positive.
        largest: The last.
        num_levels: How many, at least two.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(level, 3) for level in geometric_levels(0.1, 10.0, 3)]
        [0.1, 1.0, 10.0]
    """
    if not 0 < smallest < largest or num_levels < 2:
        raise ValueError(
            "geometric_levels needs 0 < smallest < largest and at least two levels, got "
            f"{smallest!r}, {largest!r} and {num_levels!r}"
        )
    ratio = (largest / smallest) ** (1 / (num_levels - 1))
    return tuple(smallest * ratio**i for i in range(num_levels))


class DenoisingScoreMatching(ScoreObjective):
    r"""Denoising score matching at one or several noise levels.

    Args:
        noise_std: :math:`\sigma` in units of (unconstrained) x; or several levels, such as
            :func:`geometric_levels`.
        num_noise: M, noise draws per datum.
        conditioning: How the energy knows the level: ``"argument"`` calls it as ``energy(x,
            noise_std=...)``, with levels shaped as rows of x; ``"scale"`` takes :math:`U / \sigma`,
            so that the model's site itself is not what was learned, but :meth:`law` is; ``"none"``
            for a single level.
        weighting: ``"variance"`` multiplies the loss by :math:`\sigma^2`, ``"uniform"`` does not;
            ``None`` is ``"variance"`` for several levels, of which the smallest would drown the
            others, and ``"uniform"`` for one.
        control_variate: Whether to take away what has mean zero and blows up at small levels; for
            a second score per draw. Worth it at levels far below the scale of the data.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: On a support that is not continuous.
        ValueError: If an argument is out of range, the data are integers, the guide holds a
            contrast, or the energy's slope jumps.
        TypeError: If the energy takes no ``noise_std`` and ``conditioning="argument"``.

    Warns:
        SurrogateWarning: If ``conditioning="scale"``, of which sites do not have the learned law.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=data)
        >>> objective = DenoisingScoreMatching(0.5, num_noise=8)
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.05}), loss=objective)
        >>> data = torch.randn(1000)
        >>> losses = [svi.step(data) for _ in range(200)]
        >>> abs(1 / pyro.param("precision").item() - (data.var().item() + 0.25)) < 0.2
        True
    """

    why_smooth = "gradients of {who} do not see the jumps move with the parameters"

    def __init__(
        self,
        noise_std: float | Sequence[float],
        num_noise: int = 1,
        *,
        conditioning: Conditioning = "none",
        weighting: Weighting | None = None,
        control_variate: bool = False,
        **elbo: Any,
    ) -> None:
        super().__init__(**elbo)
        self.levels = _levels(noise_std)
        self.num_noise = whole("num_noise", num_noise, least=1)
        self.conditioning = self._conditioning(conditioning)
        self.weighting = self._weighting(weighting)
        self.control_variate = control_variate

    def _conditioning(self, value: Conditioning) -> Conditioning:
        if value not in ("none", "argument", "scale"):
            raise ValueError(f"conditioning must be 'none', 'argument' or 'scale', got {value!r}")
        if value == "none" and len(self.levels) > 1:
            raise ValueError(
                f"{len(self.levels)} noise levels have a law each, so the energy must know the "
                "level: conditioning='argument' calls it as energy(x, noise_std=...), "
                "conditioning='scale' uses U(x) / noise_std"
            )
        if value == "scale":
            warnings.warn(
                "DenoisingScoreMatching(conditioning='scale') learns the laws of U / noise_std, and"
                " the model's own site, its draws and its density, is none of them: take those of "
                "objective.law(p, noise_std)",
                SurrogateWarning,
                stacklevel=3,
            )
        return value

    def _weighting(self, value: Weighting | None) -> Weighting:
        if value not in (None, "uniform", "variance"):
            raise ValueError(f"weighting must be 'uniform', 'variance' or None, got {value!r}")
        return value or ("variance" if len(self.levels) > 1 else "uniform")

    def law(self, p: EnergyDistribution, noise_std: float | None = None) -> EnergyDistribution:
        r"""Returns the law that was learned at a level: that of the data, blurred by it.

        With ``conditioning="scale"`` its potential in unconstrained coordinates is :math:`U /
        \sigma`, with ``"argument"`` its energy is called at the level, and with ``"none"`` it is
        ``p`` itself.

        Args:
            p: The distribution of the model's site; its base and support are kept.
            noise_std: The level :math:`\sigma` in units of (unconstrained) x, also one between
                those that were learned; the smallest of these by default.

        Raises:
            ValueError: If the level is not positive, or not the one of ``conditioning="none"``.

        Example:
            >>> import warnings
            >>> with warnings.catch_warnings(action="ignore"):
            ...     objective = DenoisingScoreMatching([0.1, 1.0], conditioning="scale")
            >>> learned = EnergyDistribution(lambda x: 0.05 * x.square(), event_shape=())
            >>> objective.law(learned, 0.1).potential(torch.tensor(2.0))  # of the standard normal
            tensor(2.)
        """
        level = min(self.levels) if noise_std is None else positive("noise_std", noise_std)
        if self.conditioning == "argument":
            return _at_level(p, level)
        if self.conditioning == "scale":
            return _with_energy(p, _divided(p, self.space(p).transform, level))
        if level not in self.levels:
            raise ValueError(
                f"this DenoisingScoreMatching has learned the law at noise_std={self.levels[0]:g} "
                f"alone, got {level:g}: give several levels and conditioning='argument' or 'scale'"
            )
        return p

    def draw_at(self, space: Unconstrained, u: Tensor) -> Noise:
        """Draws noise beside every datum, and a level for each."""
        z = torch.randn((self.num_noise, *u.shape), dtype=u.dtype, device=u.device)
        levels = torch.tensor(self.levels, dtype=u.dtype, device=u.device)
        shape = (self.num_noise, *space.rows(u))
        return Noise(z, levels[torch.randint(len(levels), shape, device=u.device)])

    def per_datum(self, p: EnergyDistribution, x: Tensor, contrast: Noise, log_z: Tensor) -> Tensor:
        """Returns the loss of a datum, averaged over its noise.

        In squared score units; in pure numbers with the weighting by variance.
        """
        space = self.space(p)
        loss = space.event_sum(self._terms(p, space.coordinates(x), contrast))
        if self.weighting == "uniform":
            loss = loss / contrast.noise_std.square()
        return loss.mean(0)

    def _terms(self, p: EnergyDistribution, u: Tensor, contrast: Noise) -> Tensor:
        """Returns the loss times the squared level, coordinate by coordinate.

        The factor keeps the parts of the sum of order one at small levels.
        """
        z, noise_std = contrast
        std = _beside_event(noise_std, z)
        if not self.control_variate:
            return 0.5 * (z + std * self._score(p, u + std * z, noise_std)).square()
        points = torch.stack([u + std * z, u.expand_as(z)])
        near, here = std * self._score(p, points, noise_std.expand(2, *noise_std.shape))
        return 0.5 + z * (near - here) + 0.5 * near.square()

    def _score(self, p: EnergyDistribution, u: Tensor, noise_std: Tensor) -> Tensor:
        """Returns minus the gradient of the energy of every point's own level."""
        score = self._at_levels(p, noise_std).score(u)
        return score / _beside_event(noise_std, u) if self.conditioning == "scale" else score

    def _at_levels(self, p: EnergyDistribution, noise_std: Tensor) -> Unconstrained:
        return self.space(_at_level(p, noise_std) if self.conditioning == "argument" else p)

    def check_unconditional(
        self, name: str, p: EnergyDistribution, x: Tensor, known: Tensor | None
    ) -> None:
        """Raises if the energy does not know the level, or its slope jumps."""
        level = torch.full(rows_of(p, x), min(self.levels), dtype=x.dtype, device=x.device)
        try:
            self.check_smooth(name, self._at_levels(p, level), x)
        except TypeError as error:
            if "noise_std" not in str(error):
                raise
            raise TypeError(
                f"EBM site {name!r}: conditioning='argument' calls the energy as energy(x, "
                f"noise_std=...), and {type(p.energy_function).__name__} does not take it "
                f"({error}): add the keyword, or say conditioning='scale'"
            ) from error


def _levels(noise_std: float | Sequence[float]) -> tuple[float, ...]:
    given = torch.as_tensor(noise_std, dtype=torch.float64).detach()
    if given.dim() > 1 or not given.numel() or not (given > 0).all() or given.isinf().any():
        raise ValueError(
            f"noise_std must be a positive number or several of them, got {noise_std!r}"
        )
    return tuple(given.reshape(-1).tolist())


def _beside_event(noise_std: Tensor, like: Tensor) -> Tensor:
    """Gives levels ``rows`` the event dims of ``like``, each of size one."""
    return noise_std.reshape(noise_std.shape + (1,) * (like.dim() - noise_std.dim()))


def _at_level(p: EnergyDistribution, noise_std: Tensor | float) -> EnergyDistribution:
    """Returns the law whose energy is that of ``p`` at the given level, or one for every row."""

    def energy(x: Tensor) -> Tensor:
        levels = torch.as_tensor(noise_std, dtype=x.dtype, device=x.device)
        rows = x.shape[: x.dim() - len(p.event_shape)]
        with p.fixed_weights():
            return p.energy_function(x, noise_std=levels.expand(rows))  # type: ignore[call-arg]

    return _with_energy(p, energy)


def _divided(p: EnergyDistribution, transform: Transform, noise_std: float) -> EnergyFn:
    """Returns the energy, as to the base of ``p``, of its potential in u divided by the level."""

    def energy(x: Tensor) -> Tensor:
        log_det = transform.log_abs_det_jacobian(transform.inv(x), x)
        divided = (p.potential(x) - log_det) / noise_std + log_det
        return divided if p.base is None else divided + p.base.log_prob(x)

    return energy


def _with_energy(p: EnergyDistribution, energy: EnergyFn) -> EnergyDistribution:
    """Returns the law of another energy on the same base and support."""
    if p.base is not None:
        return EnergyDistribution(energy, p.base)
    return EnergyDistribution(
        energy, event_shape=p.event_shape, support=p.support, batch_shape=p.batch_shape
    )
