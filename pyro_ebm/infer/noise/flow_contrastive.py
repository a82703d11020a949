r"""Flow contrastive estimation: an energy and a flow learn from each other.

The EBM :math:`p_\theta = e^{-U} / Z` and a density :math:`q_\alpha` that can be drawn from with
gradients play for

.. math::
    V = E_d \log \frac{p_\theta}{p_\theta + q_\alpha}
        + E_{q_\alpha} \log \frac{q_\alpha}{p_\theta + q_\alpha}
      = -E_d\,\mathrm{softplus}(-D) - E_{q_\alpha}\,\mathrm{softplus}(D), \qquad
    D = -U - c - \log q_\alpha.

The energy raises V: this is NCE with one noise draw per datum, the flow held. The flow lowers V,
with :math:`\log q_\alpha` differentiated in both terms and the energy held; where
:math:`p_\theta = p_{data}`, V is :math:`2\,\mathrm{JSD}(q_\alpha \| p_{data}) - 2 \log 2`. So noise
comes to the data while the energy learns, and NCE keeps something to learn from. The flow's own
likelihood may suffer; :math:`-\gamma E_d \log q_\alpha` keeps it up, and alone it makes NCE with a
flow that follows the data. log Z is that of the energy, whatever the flow does: c is kept while
noise changes.

References:
    Gao, Nijkamp, Kingma, Xu, Dai and Wu, Flow contrastive estimation of energy-based models, CVPR
    2020, arXiv:1912.00589.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.noise.nce import NCE, CUpdate
from pyro_ebm.infer.scoring.contrast import Contrast, contrast_law
from pyro_ebm.infer.scoring.held import hold_parameters

MEMORY = 0.9  # of the discriminator's accuracy, per evaluation


class FlowContrastive(NCE):
    r"""Flow contrastive estimation.

    The guide's site of the same name is the flow: a ``TransformedDistribution``, a flow of zuko as
    ``pyro.contrib.zuko.ZukoToPyro(flow())``, or any density with ``rsample``, its parameters
    registered there (``pyro.module``). Importing zuko turns off the validation of torch, and with
    it that of data against supports; ``pyro.enable_validation(True)`` brings it back.
    Pre-train the flow by maximum likelihood: ``schedule=(0, 1)`` with ``adversarial_weight=0`` and
    ``mle_weight=1`` does.

    Args:
        schedule: ``(energy steps, flow steps)``, taken in turns; ``None`` never moves the flow.
        simultaneous: Moves both at every step, each by its own loss; replaces ``schedule``.
        throttle: ``(low, high)`` for the accuracy of telling data from the flow's draws, averaged
            over about ten steps: above ``high`` it is the flow's turn, below ``low`` the energy's,
            whatever the schedule. Chance is 0.5.
        mle_weight: :math:`\gamma \ge 0`.
        adversarial_weight: Weight of V in the flow's loss.
        c_update: As for :class:`NCE`.
        c_rate: As for :class:`NCE`.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If the guide holds no flow, it cannot be drawn from with gradients, or arguments
            contradict each other.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=data)
        >>> def guide(data):
        ...     loc = pyro.param("loc", torch.tensor(2.0))
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("x", dist.Normal(loc, 1.2))
        >>> objective = FlowContrastive(mle_weight=0.1)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=objective)
        >>> data = torch.randn(1000)
        >>> losses = [svi.step(data) for _ in range(400)]
        >>> abs(pyro.param("precision").item() - 1 / data.var().item()) < 0.3
        True
        >>> abs(pyro.param("loc").item()) < 0.3
        True
    """

    has_second_player = True
    is_held_out_criterion = False  # the noise moves

    skill: Tensor

    def __init__(
        self,
        *,
        schedule: tuple[int, int] | None = (1, 1),
        simultaneous: bool = False,
        throttle: tuple[float, float] | None = None,
        mle_weight: float = 0.0,
        adversarial_weight: float = 1.0,
        c_update: CUpdate = "gradient",
        c_rate: float = 0.1,
        **elbo: Any,
    ) -> None:
        turns = None if simultaneous else schedule
        super().__init__(1, c_update=c_update, c_rate=c_rate, schedule=turns, **elbo)
        if throttle is not None and not 0 <= throttle[0] < throttle[1] <= 1:
            raise ValueError(f"throttle must be (low, high) with low < high, got {throttle!r}")
        if throttle is not None and simultaneous:
            raise ValueError("throttle decides whose turn it is; with simultaneous=True all move")
        if mle_weight < 0 or adversarial_weight < 0 or mle_weight + adversarial_weight == 0:
            raise ValueError(
                "mle_weight and adversarial_weight must not be negative, nor both zero, got "
                f"{mle_weight!r} and {adversarial_weight!r}"
            )
        self.simultaneous = simultaneous
        self.throttle = throttle
        self.mle_weight = mle_weight
        self.adversarial_weight = adversarial_weight
        self.register_buffer("skill", torch.tensor(float("nan")))
        self._turn = (-1, False)
        self.is_replayable = throttle is None and self.is_replayable

    @property
    def is_second_players_turn(self) -> bool:
        """Whether the step in progress is the flow's; decided once per step."""
        if self.throttle is None or not torch.is_grad_enabled():
            return super().is_second_players_turn
        step = int(self.num_steps_taken)
        if self._turn[0] != step:
            self._turn = (step, self._decide(super().is_second_players_turn))
        return self._turn[1]

    def _decide(self, scheduled: bool) -> bool:  # noqa: FBT001
        low, high = self.throttle  # type: ignore[misc]
        skill = float(self.skill)
        return skill > high or (scheduled and not skill < low)

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws one point of the flow beside every datum, without gradients."""
        return super().draw(p, x, self._flow(p, noise))

    @staticmethod
    def _flow(p: EnergyDistribution, noise: Any) -> Any:
        if noise is None:
            raise ValueError(
                f"FlowContrastive trains the noise of {p!r}, so the guide must hold it: give the "
                "guide a sample site of the same name, with a flow"
            )
        return noise

    def site_loss(
        self, name: str, p: EnergyDistribution, x: Tensor, noise: Any, log_z: Tensor | None
    ) -> Tensor:
        """Returns the loss per datum in nats of whose turn it is, or of both players at once."""
        if self.is_second_players_turn:
            loss = self.second_player(p, x, noise, self._held(name, p, x, noise, log_z))
        else:
            loss = super().site_loss(name, p, x, noise, log_z)
            if self.simultaneous and torch.is_grad_enabled():
                flows = self.second_player(p, x, noise, self._held(name, p, x, noise, log_z))
                loss = loss + (flows - flows.detach())
        if torch.is_grad_enabled():
            self._remember(self.evaluation.notes["accuracy"])
        return loss

    @torch.no_grad()
    def _held(
        self, name: str, p: EnergyDistribution, x: Tensor, noise: Any, log_z: Tensor | None
    ) -> Tensor:
        """Log Z of a site, as far as it is known or learned."""
        if log_z is None:
            log_z = self.log_normalizer_of(name, p, x, self.draw(p, x, noise))
        return log_z.detach()  # type: ignore[union-attr]

    def _remember(self, accuracy: Tensor) -> None:
        now = accuracy.to(self.skill)
        mean = torch.lerp(now, self.skill, MEMORY)
        self.skill.copy_(torch.where(self.skill.isnan(), now, mean))  # a captured step's own tensor

    def second_player(
        self, p: EnergyDistribution, x: Tensor, noise: Any, log_z: Tensor | float = 0.0
    ) -> Tensor:
        """Returns the flow's loss per datum in nats: the game's value and the flow's likelihood.

        Args:
            p: The EBM, held.
            x: Data.
            noise: The guide's site.
            log_z: c, held.

        Raises:
            ValueError: If the flow cannot draw with gradients.
        """
        q = contrast_law(self._flow(p, noise), p, x, needs_density=True, who=type(self).__name__)
        if not q.has_rsample:
            raise ValueError(
                f"FlowContrastive trains the noise, but {type(q).__name__} cannot draw with "
                "gradients: use a TransformedDistribution, or NCE with the noise held"
            )
        y = q.rsample()
        at_data, at_flow = q.log_prob(x), q.log_prob(y)  # y apart: its inverse is cached
        held = hold_parameters(p.unnormalized_log_prob, torch.stack([x, y]), len(p.event_shape))
        data, flow = held[0] - log_z - at_data, held[1] - log_z - at_flow
        value = -softplus(-data) - softplus(flow)
        correct = 0.5 * ((data > 0).double() + (flow < 0).double())
        self.evaluation.note(accuracy=correct, value=value, flow_log_prob=at_data)
        return self.adversarial_weight * value - self.mle_weight * at_data
