"""One model, several energy-based sites, each learned by the objective that suits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.surrogate_elbo import SurrogateELBO
from pyro_ebm.ops.log_normalizer import LogNormalizer


class PerSite(SurrogateELBO):
    """Routes every EBM site to an objective of its own.

    Unlike ``surrogate(model, {...})`` under a stock ELBO, the guide may hold the contrasts.

    Args:
        objectives: One objective per site, by name.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``; those of the members are not used.

    Raises:
        TypeError: If what is given for a site is no objective.
        ValueError: When the model has an EBM site without an objective.

    Example:
        >>> from pyro_ebm.infer import NCE, EnergyDiscrepancy
        >>> loss = PerSite({"x": NCE(num_noise=5), "y": EnergyDiscrepancy(time=0.5)})
        >>> sorted(loss.members)
        ['x', 'y']
    """

    members: Mapping[str, Objective]

    def __init__(self, objectives: Mapping[str, Objective], **elbo: Any) -> None:
        super().__init__(**elbo)
        others = {n: o for n, o in objectives.items() if not isinstance(o, Objective)}
        if others:
            raise TypeError(f"PerSite takes an objective per site, such as NCE(), got {others}")
        self.members = dict(objectives)
        each = self.members.values()
        self._modules_of_members = nn.ModuleList(each)
        self.is_replayable = all(m.is_replayable for m in each)
        self.is_held_out_criterion = all(
            m.is_held_out_criterion and m.schedule is None for m in each
        )

    @property
    def parameter_prefixes(self) -> tuple[str, ...]:
        """The prefixes of the members' own parameters."""
        return tuple(member.parameter_prefix for member in self.members.values())

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

    def count_step(self) -> None:
        """Lets every member count the step, too."""
        super().count_step()
        for member in set(self.members.values()):
            member.count_step()

    def objective_of(self, site: str) -> Objective:
        """Returns the site's own objective."""
        return self.members[site]

    def log_normalizer(self, site: str) -> LogNormalizer:
        """Returns the log Z that the site's own objective has learned, in nats."""
        return self.members[site].log_normalizer(site)

    def freeze(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses.

        Raises:
            NotImplementedError: Always, with what to do instead.
        """
        raise NotImplementedError(
            "PerSite cannot be frozen: freeze each objective and use surrogate(model, {site: "
            "frozen, ...})"
        )
