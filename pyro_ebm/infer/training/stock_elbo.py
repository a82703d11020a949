"""A ``Trace_ELBO`` of Pyro's own in the place of an objective, so that one loop trains both.

It has no EBM sites, no diagnostics, no parameters of its own and no second player.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring.objective import Objective
from pyro_ebm.infer.scoring.surrogate_elbo import SurrogateELBO


class StockELBO:
    """What ``fit`` asks of an objective, answered for an ELBO that is none.

    Args:
        elbo: The ELBO; its state is what it has as a module, if it is one.

    Example:
        >>> loss = StockELBO(Trace_ELBO(num_particles=3))
        >>> loss.num_particles, loss.sites, dict(loss.state_dict())
        (3, {}, {})
    """

    is_held_out_criterion = True
    schedule: tuple[int, int] | None = None
    parameter_prefixes: tuple[str, ...] = ()
    members: Mapping[str, SurrogateELBO] = {}
    optimized: frozenset[int] = frozenset()

    def __init__(self, elbo: Trace_ELBO) -> None:
        self.elbo = elbo
        self.sites: dict[str, EnergyDistribution] = {}
        self.diagnostics: dict[str, Mapping[str, Tensor]] = {}
        self._state = elbo if isinstance(elbo, nn.Module) else nn.Module()

    @property
    def num_particles(self) -> int:
        """How many draws of the guide a loss is a mean over."""
        return int(self.elbo.num_particles)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the whole data set's loss in nats."""
        loss: Tensor = self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        return loss

    def modules(self) -> Iterator[nn.Module]:
        """Yields the modules that it consists of."""
        return self._state.modules()

    def state_dict(self) -> dict[str, Any]:
        """Returns its state: none, unless it is a module."""
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        self._state.load_state_dict(state)


Loss = SurrogateELBO | StockELBO


def as_loss(given: Trace_ELBO) -> Loss:
    """Returns an objective as it is, and any other ELBO in its wrapper."""
    return given if isinstance(given, SurrogateELBO) else StockELBO(given)


def as_given(loss: Loss) -> Trace_ELBO:
    """Returns what the user has handed over, which messages and settings are about."""
    return loss.elbo if isinstance(loss, StockELBO) else loss


def objectives_of(loss: Loss) -> list[Objective]:
    """Returns the objective and those that it consists of; none if it is a stock ELBO."""
    return [part for part in loss.modules() if isinstance(part, Objective)]
