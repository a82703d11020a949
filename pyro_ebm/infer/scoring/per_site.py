"""One model, several energy-based sites, each learned by the objective that suits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring.objective import Objective


class PerSite(Objective):
    """Routes every EBM site to an objective of its own.

    Unlike ``surrogate(model, {...})`` under a stock ELBO, the guide may hold the contrasts.

    Args:
        objectives: One objective per site, by name.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``; those of the members are not used.

    Raises:
        ValueError: When the model has an EBM site without an objective.

    Example:
        >>> from pyro_ebm.infer import NCE, EnergyDiscrepancy
        >>> loss = PerSite({"x": NCE(num_noise=5), "y": EnergyDiscrepancy(time=0.5)})
        >>> sorted(loss.members)
        ['x', 'y']
    """

    needs_density = False
    why_not_frozen = "freeze each objective and use surrogate(model, {site: frozen, ...})"

    def __init__(self, objectives: Mapping[str, Objective], **elbo: Any) -> None:
        super().__init__(**elbo)
        self.members = dict(objectives)
        each = self.members.values()
        self._modules_of_members = nn.ModuleList(each)
        self.learns_log_normalizer = any(
            m.learns_log_normalizer and m.learns_by_gradient for m in each
        )
        self.is_replayable = all(m.is_replayable for m in each)
        self.is_held_out_criterion = all(
            m.is_held_out_criterion and m.schedule is None for m in each
        )

    @property
    def parameter_prefixes(self) -> tuple[str, ...]:
        """The prefixes of the members' own parameters."""
        return tuple(member.parameter_prefix for member in self.members.values())

    def per_datum(self, p: EnergyDistribution, x: Tensor, contrast: Any, log_z: Tensor) -> Tensor:
        """Not used: every site is scored by its own objective.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("PerSite scores every site by the objective given for it")

    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **options: Any) -> Tensor:
        """Returns minus the loss per datum of the site's own objective.

        Raises:
            ValueError: If there is none for the site.
        """
        if name not in self.members:
            raise ValueError(
                f"no objective for EBM site {name!r}; the given ones are for {sorted(self.members)}"
            )
        member = self.members[name]
        log_prob = member.site_log_prob(name, p, x, **options)
        self.sites[name] = p
        self.diagnostics[name] = member.diagnostics[name]
        return log_prob

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss in nats for the whole data set, and lets every member count the step."""
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if torch.is_grad_enabled():
            for member in set(self.members.values()):
                member.num_steps_taken += 1
        return loss

    def objective_of(self, site: str) -> Objective:
        """Returns the site's own objective."""
        return self.members[site]

    def keeps_log_normalizer(self, site: str) -> bool:
        """Whether log Z of a site is one number that the site's own objective has learned."""
        return self.members[site].keeps_log_normalizer(site)

    def log_normalizer(self, site: str) -> Any:
        """Returns the log Z that the site's own objective has learned."""
        return self.members[site].log_normalizer(site)
