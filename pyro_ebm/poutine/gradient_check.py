r"""Testing a function that claims to be log Z against the energy that it belongs to.

For :math:`p(x\mid\theta) = e^{-U(x,\theta)} / Z(\theta)` every true normalizer satisfies

.. math:: \partial_\theta \log Z = -E_p[\partial_\theta U],

and the right side needs only draws. They are split in groups. The first half chooses the direction
in which the two sides differ most; the second half estimates the slope along it with an independent
standard error, so that a tensor of any size takes one test. An additive error of log Z has no
gradient and stays unseen; it shifts no answer but evidence.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import ApproximateSampleWarning

_GROUPS = 16  # for the direction, and as many again for the test
MAX_Z = 5.0
TOLERANCE = 0.02


@dataclass(frozen=True)
class GradientCheck:
    """The slope of log Z along the direction in which it looks most wrong, in nats per unit.

    Attributes:
        name: The latent or parameter that the slope is with respect to.
        given: The slope of the log Z that was given.
        expected: Minus the mean slope of the potential over draws.
        stderr: Standard error of ``expected``.
    """

    name: str
    given: float
    expected: float
    stderr: float

    @property
    def agrees(self) -> bool:
        """Whether the two are within five standard errors and two percent of each other."""
        allowed = TOLERANCE * max(abs(self.given), abs(self.expected)) + 1e-6
        return abs(self.given - self.expected) <= MAX_Z * self.stderr + allowed

    def __str__(self) -> str:
        return (
            f"d log Z / d {self.name} is {self.given:.4g}, "
            f"expected {self.expected:.4g} ± {self.stderr:.2g}"
        )


def check_gradients(
    p: EnergyDistribution, leaves: Mapping[str, Tensor], num_samples: int
) -> tuple[GradientCheck, ...] | None:
    """Compares the gradient of log Z with minus the mean gradient of the potential.

    Args:
        p: An EBM with a known log Z.
        leaves: By name, the leaf tensors that its potential depends on.
        num_samples: Draws, counted over all rows of the batch; at least four per group are made.

    Returns:
        One comparison per leaf, or ``None`` where the draws had visibly not converged or the
        potential is not finite at them.
    """
    draws = _draws(p, num_samples)
    if draws is None:
        return None
    tensors = list(leaves.values())
    with torch.enable_grad():
        log_z = p.log_normalizer_value()
        rows = draws.shape[1 : draws.dim() - len(p.event_shape)]
        given = _gradients(torch.as_tensor(log_z).expand(rows).sum(), tensors)
        expected = [_expected(p, group, tensors) for group in draws.chunk(2 * _GROUPS)]
    if not all(bool(torch.isfinite(g).all()) for group in expected for g in group):
        return None
    by_leaf = zip(leaves, given, zip(*expected, strict=True), strict=True)
    return tuple(_compare(name, slope, torch.stack(groups)) for name, slope, groups in by_leaf)


def _draws(p: EnergyDistribution, num_samples: int) -> Tensor | None:
    each = max(8 * _GROUPS, num_samples // max(p.batch_shape.numel(), 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ApproximateSampleWarning)
        try:
            return p.sample(torch.Size((each - each % (2 * _GROUPS),)))
        except ApproximateSampleWarning:
            return None


def _expected(p: EnergyDistribution, draws: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return _gradients(p.unnormalized_log_prob(draws).mean(0).sum(), leaves)


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Flat gradients, zero for leaves that ``value`` does not depend on."""
    if not value.requires_grad:
        return [torch.zeros(t.numel(), dtype=t.dtype, device=t.device) for t in leaves]
    # what lies between the leaves and the energy's own arguments is shared by all groups
    found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    pairs = zip(found, leaves, strict=True)
    return [(torch.zeros_like(t) if g is None else g).flatten() for g, t in pairs]


def _compare(name: str, given: Tensor, expected: Tensor) -> GradientCheck:
    """Chooses a direction from the first groups and compares along it on the others."""
    direction = given - expected[:_GROUPS].mean(0)
    direction = direction / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny)
    if direction.numel() == 1:
        direction = torch.ones_like(direction)
    slopes = expected[_GROUPS:] @ direction
    stderr = slopes.std() / _GROUPS**0.5
    return GradientCheck(name, float(given @ direction), float(slopes.mean()), float(stderr))
