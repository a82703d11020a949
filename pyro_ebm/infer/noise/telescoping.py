r"""Telescoping density-ratio estimation: a chain of easy comparisons instead of one impossible one.

Where noise :math:`q` and data :math:`p` hardly overlap, one classifier tells them apart long before
it knows their ratio. Waymarks lead from one to the other,

.. math::
    x_k = \sqrt{1 - \alpha_k^2}\, x_0 + \alpha_k x_m, \qquad x_0 \sim p_{data},\ x_m \sim q,\
    0 = \alpha_0 < \dots < \alpha_m = 1,

and the m ratios of neighbours multiply up to the model:

.. math::
    \log p(x) = \log q(x) + \sum_{k=1}^m \log r_k(x), \qquad \log r_k = -E_k(x) - c / m, \qquad
    L = \frac1m \sum_k E\,\mathrm{softplus}(-\log r_k(x_{k-1}))
    + E\,\mathrm{softplus}(\log r_k(x_k)).

So the model is the EBM with energy :math:`E = \sum_k E_k` on the base q, and the bridges
:math:`E_k` are what is learned: :class:`BridgeEnergy` makes such an energy of a network with one
output per bridge, so that all bridges cost one pass over the m + 1 waymarks. Each bridge must be
free by a constant. With noise other than the base the last bridge takes the ratio of the two, and
with one bridge this is NCE. On constrained supports waymarks are made in unconstrained coordinates.

Rhodes, Xu and Gutmann, Telescoping density-ratio estimation, NeurIPS 2020, arXiv:2006.12204.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.noise.waymarks import Waymarks, equal_steps
from pyro_ebm.infer.scoring.contrast import contrast_law, rows_of, with_data
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.unconstrained import check_interior
from pyro_ebm.ops.arguments import whole
from pyro_ebm.ops.same_values import same_values
from pyro_ebm.ops.spaces import bijection


@runtime_checkable
class Bridged(Protocol):
    """An energy that is a sum of bridges."""

    def bridges(self, x: Tensor) -> Tensor:
        """Returns the m bridges in nats, ``(m,) + sample + batch``; their sum is the energy."""


class BridgeEnergy(nn.Module):
    r"""An energy that is a sum of bridges, :math:`E_k(x) = \mathrm{net}(x)_k + b_k`.

    Args:
        net: Maps ``rows + event`` to ``rows + (m,)``: a shared trunk with one output per bridge.
        num_bridges: m. The constants :math:`b_k` are parameters, zero at first.

    Example:
        >>> energy = BridgeEnergy(nn.Linear(2, 3), num_bridges=3)
        >>> x = torch.randn(5, 2)
        >>> energy.bridges(x).shape
        torch.Size([3, 5])
        >>> torch.allclose(energy(x), energy.bridges(x).sum(0))
        True
    """

    def __init__(self, net: Callable[[Tensor], Tensor], num_bridges: int) -> None:
        super().__init__()
        self.net = net
        self.constants = nn.Parameter(torch.zeros(whole("num_bridges", num_bridges, least=1)))

    def bridges(self, x: Tensor) -> Tensor:
        """Returns the bridges in nats, ``(m,) + rows``.

        Raises:
            ValueError: If the network has another number of outputs.
        """
        values = self.net(x)
        if values.shape[-1] != len(self.constants):
            raise ValueError(
                f"net returned shape {tuple(values.shape)} for input {tuple(x.shape)}; its last "
                f"dim must hold one value for each of the {len(self.constants)} bridges"
            )
        return (values + self.constants).movedim(-1, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the energy in nats, ``rows``."""
        return self.bridges(x).sum(0)


class TelescopingNCE(Objective):
    r"""Telescoping NCE.

    Args:
        num_bridges: m, the number of bridges of the energy; 5 to 15 are usual. Raise it until no
            bridge's ``accuracy`` is near 1 (0.6 to 0.8 is best).
        noise: A normalized distribution on the EBM's support, or ``None`` for the base. A guide
            site of the same name goes before both. It is never trained here.
        waymarks: :math:`\alpha_1 < \dots < \alpha_m = 1`; ``None`` spaces them on the first batch
            so that Gaussians with the waymarks' means and variances are equally far apart
            (Fisher–Rao length along the path).
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        TypeError: If the energy has no bridges.
        ValueError: If their number is another one, waymarks do not ascend to 1, or for a
            conditional energy without a log Z of its own.
        NotImplementedError: On a discrete support.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def net(x):
        ...     shape = pyro.param("shape", torch.zeros(2))  # E_k = shape_k x^2 + b_k
        ...     return shape * x.unsqueeze(-1) ** 2
        >>> energy = BridgeEnergy(net, num_bridges=2)
        >>> def model(data):
        ...     pyro.module("energy", energy)
        ...     with pyro.plate("data", len(data)):
        ...         base = dist.Normal(0.0, 4.0)
        ...         pyro.sample("x", EnergyDistribution(energy, base=base), obs=data)
        >>> optimizer = pyro.optim.Adam({"lr": 0.05})
        >>> svi = SVI(model, lambda data: None, optimizer, loss=TelescopingNCE(num_bridges=2))
        >>> data = torch.randn(1000)
        >>> losses = [svi.step(data) for _ in range(300)]
        >>> precision = 2 * pyro.param("shape").sum() + 1 / 4.0**2
        >>> abs(precision.item() - 1 / data.var().item()) < 0.3
        True
    """

    learns_log_normalizer = True

    def __init__(
        self,
        num_bridges: int = 8,
        noise: Any = None,
        *,
        waymarks: Sequence[float] | None = None,
        **elbo: Any,
    ) -> None:
        super().__init__(**elbo)
        self.num_bridges = whole("num_bridges", num_bridges, least=1)
        self.noise = noise
        self.waymarks = None if waymarks is None else self._ascending(waymarks)

    def _ascending(self, waymarks: Sequence[float]) -> Tensor:
        given = torch.as_tensor(waymarks)
        steps = given.diff(prepend=torch.zeros_like(given[:1]))
        if given.shape != (self.num_bridges,) or bool((steps <= 0).any()) or given[-1] != 1:
            raise ValueError(
                f"waymarks must be {self.num_bridges} ascending numbers in (0, 1], the last one 1, "
                f"got {waymarks!r}"
            )
        return given

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Waymarks:
        """Draws noise beside every datum and makes the waymarks between the two.

        Noise is the last of them; its density is taken at both ends of the last bridge.

        Raises:
            NotImplementedError: On a support that is not continuous.
        """
        who = type(self).__name__
        if p.base_measure != "lebesgue":
            raise NotImplementedError(
                f"TelescopingNCE mixes data with noise, which needs a continuous support, got "
                f"{p.support}; use NCE"
            )
        law = self.noise if noise is None else noise
        q = contrast_law(law, p, x, needs_density=True, who=who)
        space = bijection(p.support, len(p.event_shape))
        check_interior(self.evaluation.site, p, x, who)
        start, end = space.inv(x), space.inv(q.sample())
        weights = self._weights(p, x, start, end).reshape((-1,) + (1,) * start.dim())
        points = space((1 - weights**2).sqrt() * start + weights * end)
        before = points[-2] if self.num_bridges > 1 else x
        log_noise = torch.cat([q.log_prob(before).unsqueeze(0), q.log_prob(points[-1:])])
        return Waymarks(points, log_noise)

    def _weights(self, p: EnergyDistribution, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        if self.waymarks is not None:
            return self.waymarks.to(start)
        site, dims = self.evaluation.site, len(rows_of(p, x))
        if site not in self.fitted:
            data, noise = (self.evaluation.rows(u, dims) for u in (start, end))
            self.fitted[site] = equal_steps(data, noise, self.num_bridges)
        return self.fitted[site].to(start)

    def log_ratios(
        self, p: EnergyDistribution, x: Tensor, contrast: Waymarks
    ) -> tuple[Tensor, Tensor]:
        """Returns the m log ratios without log Z at both their ends, each ``(m,) + rows``."""
        return self.evaluation.once("log_ratios", lambda: _log_ratios(p, x, contrast))

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Waymarks, log_z: Tensor
    ) -> Tensor:
        """Returns the mean logistic loss over bridges of one datum, in nats."""
        before, after = (r - log_z / self.num_bridges for r in self.log_ratios(p, x, contrast))
        self._diagnose(before, after, log_z)
        return (softplus(-before) + softplus(after)).mean(0)

    @torch.no_grad()
    def _diagnose(self, before: Tensor, after: Tensor, log_z: Tensor) -> None:
        """The accuracy of every bridge, and of the one that is nearest to a chasm."""
        correct = 0.5 * ((before > 0).double() + (after < 0).double())
        each = {f"accuracy_{k}": row for k, row in enumerate(correct, 1)}
        self.evaluation.note(log_z=log_z, **each)
        found = torch.stack([self.evaluation.notes[name] for name in each])
        self.evaluation.note(accuracy=found.max())

    def initial_log_normalizer(
        self, p: EnergyDistribution, x: Tensor, contrast: Waymarks
    ) -> Tensor:
        """Returns the sum of the bridges' importance sampling estimates."""
        after = self.log_ratios(p, x, contrast)[1]
        return torch.stack([self.evaluation.log_mean_exp(row) for row in after]).sum()

    def check_unconditional(
        self, name: str, p: EnergyDistribution, x: Tensor, known: Tensor | None
    ) -> None:
        """Raises if the energy is not a sum of as many bridges, or rows need a log Z each."""
        bridges, energy = bridges_of(p, x), p.energy(x)
        if len(bridges) != self.num_bridges:
            raise ValueError(
                f"the energy of EBM site {name!r} has {len(bridges)} bridges, TelescopingNCE("
                f"num_bridges={self.num_bridges}) needs {self.num_bridges}"
            )
        if not same_values(bridges.sum(0), energy):
            raise ValueError(
                f"the energy of EBM site {name!r} is not the sum of its bridges, so that what is "
                "learned would not be the model: let forward(x) return self.bridges(x).sum(0)"
            )
        super().check_unconditional(name, p, x, known)


def bridges_of(p: EnergyDistribution, x: Tensor) -> Tensor:
    """Returns the bridges of an EBM's energy in nats, ``(m,) + rows``.

    Raises:
        TypeError: If its energy has none.
    """
    energy = p.energy_function
    if not isinstance(energy, Bridged):
        raise TypeError(
            f"TelescopingNCE needs an energy that is a sum of bridges, with a method bridges(x), "
            f"got {type(energy).__name__}: use BridgeEnergy(net, num_bridges)"
        )
    with p.fixed_weights():
        return energy.bridges(p.broadcast_value(x))


def _log_ratios(p: EnergyDistribution, x: Tensor, contrast: Waymarks) -> tuple[Tensor, Tensor]:
    points = with_data(x, contrast.points)
    values = -bridges_of(p, points)
    ends = (values[:, :-1].diagonal(), values[:, 1:].diagonal())  # bridges in the last dim
    base_over_noise = -contrast.log_noise
    if p.base is not None:
        base_over_noise = base_over_noise + p.base.log_prob(points[-2:])
    before, after = (
        torch.cat([e[..., :-1], e[..., -1:] + change.unsqueeze(-1)], -1).movedim(-1, 0)
        for e, change in zip(ends, base_over_noise, strict=True)
    )
    return before, after
