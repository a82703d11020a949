r"""The handler that puts a learnable surrogate where an EBM's intractable log density would stand.

Every EBM site keeps its name, value, plates, scale and mask; only ``log_prob`` changes: it becomes
minus the objective's loss per datum. Everything in Pyro that works on log densities goes on
working.

``poutine.surrogate(model, objective)`` is the bare handler, for MCMC over a *frozen* objective and
for effect-style guides. Under SVI pass the objective itself as the loss, since only then may the
guide hold the contrast: a stock ELBO would count the guide's draw of it as a density.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pyro
import pyro.poutine
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.distributions.call_stack import is_inside_elbo
from pyro_ebm.distributions.layers import layers, mask_of, num_reinterpreted
from pyro_ebm.distributions.wrappers import rewrap
from pyro_ebm.poutine.summed_out import refuse_mixture


class SurrogateObjective(Protocol):
    """What the handler asks of an objective.

    Attributes:
        is_frozen: Whether the score of a site is one fixed function of its parameters.
        is_likelihood: Whether latents may be summed out of its exponential, as of a likelihood.
        is_normalized: Whether the score is the log density, log Z at all parameters included.
    """

    is_frozen: bool
    is_likelihood: bool
    is_normalized: bool

    def site_log_prob(
        self,
        name: str,
        p: EnergyDistribution,
        x: Tensor,
        *,
        noise: Any,
        observed: bool,
        log_z: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Returns minus the loss per datum in nats, with the batch shape of ``x``."""

    def free_log_normalizers(self) -> Mapping[str, Any]:
        """Returns priors of log Z for the sites of a frozen objective that must infer it."""


class SiteScorer(ABC):
    """Scores observed EBM sites by a fixed function; no log Z of theirs is inferred.

    A subclass defines :meth:`site_log_prob`, and says what its score is.
    """

    is_frozen = True
    is_likelihood = False
    is_normalized = False

    @abstractmethod
    def site_log_prob(self, name: str, p: EnergyDistribution, x: Tensor, **context: Any) -> Tensor:
        """Returns the score in nats, ``sample + batch``."""

    def free_log_normalizers(self) -> Mapping[str, Any]:
        """Returns nothing."""
        return {}


class SurrogateDistribution(TorchDistribution):
    """An EBM with an objective's surrogate as ``log_prob``; made by :class:`SurrogateMessenger`.

    Attributes:
        is_normalized: Whether the surrogate is the log density, log Z at all parameters included.
    """

    arg_constraints: dict[str, Constraint] = {}
    has_rsample = False

    def __init__(
        self,
        p: EnergyDistribution,
        score: Callable[[EnergyDistribution, Tensor], Tensor],
        mask: Tensor | None = None,
        *,
        is_normalized: bool = False,
    ) -> None:
        self.p = p
        self.is_normalized = is_normalized
        self._score = score
        self.mask = mask
        super().__init__(p.batch_shape, p.event_shape, validate_args=p._validate_args)

    @property
    def support(self) -> Constraint:
        """The EBM's support."""
        return self.p.support

    @property
    def base_measure(self) -> str:
        """The EBM's base measure."""
        return self.p.base_measure

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws from the EBM itself."""
        return self.p.sample(sample_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns minus the surrogate loss per datum."""
        x = self.without_padding(x)
        if self._validate_args:
            self._validate_sample(x)
        return self._score(self.p, x)

    def without_padding(self, x: Tensor) -> Tensor:
        """Puts a row that counts wherever the mask is false, unless gradients flow to ``x``.

        Whatever stands there may be NaN or off the support, and zero times the gradient of NaN is
        NaN.
        """
        if self.mask is None or x.requires_grad:
            return x
        event = x.shape[x.dim() - len(self.event_shape) :]
        rows = torch.broadcast_shapes(x.shape[: x.dim() - len(event)], self.mask.shape)
        counts = self.mask.expand(rows)
        first = counts.flatten().to(torch.uint8).argmax(0, keepdim=True)
        row = x.expand(rows + event).reshape((-1, *event)).index_select(0, first)[0]
        return torch.where(counts.reshape(rows + (1,) * len(event)), x, row)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SurrogateDistribution:
        """Returns the surrogate of the expanded EBM."""
        return SurrogateDistribution(
            self.p.expand(batch_shape), self._score, self.mask, is_normalized=self.is_normalized
        )


def surrogate_of(fn: Any) -> SurrogateDistribution:
    """Returns the surrogate inside the distribution of a scored site."""
    return next(layer for layer in layers(fn) if isinstance(layer, SurrogateDistribution))


class SurrogateMessenger(Messenger):
    """Replaces EBM sites by their surrogates.

    Args:
        objectives: One objective for all sites, or one per site.
        noise_of: Site name to the contrast that a guide holds for it, or ``None``.
        fresh_noise: Whether new contrast draws are legitimate at every evaluation (an objective's
            own loss).
    """

    def __init__(
        self,
        objectives: SurrogateObjective | Mapping[str, SurrogateObjective],
        noise_of: Callable[[str], Any] | None = None,
        *,
        fresh_noise: bool = False,
    ) -> None:
        super().__init__()
        self.objectives = objectives
        self.noise_of = noise_of or (lambda name: None)
        self.fresh_noise = fresh_noise
        self.used: list[str] = []
        self.log_normalizers: dict[str, Tensor] = {}
        self.summed_out: dict[str, int] = {}

    def __enter__(self) -> Any:
        """Installs the handler; draws log Z of a frozen objective's sites, outside all plates."""
        self.used.clear()
        self.summed_out = {}
        entered = super().__enter__()
        self.log_normalizers = {
            site: pyro.sample(f"{site}_log_normalizer", prior)
            for site, prior in self._free().items()
        }
        return entered

    def _free(self) -> dict[str, Any]:
        given = self.objectives
        if not isinstance(given, Mapping):
            return dict(given.free_log_normalizers())
        priors = {site: member.free_log_normalizers() for site, member in given.items()}
        return {site: own[site] for site, own in priors.items() if site in own}

    def _pyro_sample(self, msg: Any) -> None:
        if unwrap(msg["fn"]) is None:
            return
        name, observed = msg["name"], msg["is_observed"]
        if not observed and self._objective(name).is_frozen and not self.fresh_noise:
            return  # MCMC samples a latent through its own energy
        self.used.append(name)
        mask = _mask_of(msg["fn"], msg["mask"])
        event_made = num_reinterpreted(msg["fn"])
        score = self._scorer(name, mask, observed=observed, event_made=event_made)
        known = self._objective(name).is_normalized
        msg["fn"] = rewrap(
            msg["fn"], lambda p: SurrogateDistribution(p, score, mask, is_normalized=known)
        )

    def _pyro_post_sample(self, msg: Any) -> None:
        """Notes which latents an inference around this handler sums out, and in which dims."""
        dim = msg["infer"].get("_enumerate_dim")
        if dim is not None and not msg["is_observed"]:
            self.summed_out[msg["name"]] = dim

    def _scorer(
        self, name: str, mask: Tensor | None, *, observed: bool, event_made: int
    ) -> Callable[[EnergyDistribution, Tensor], Tensor]:
        objective = self._objective(name)
        noise = self.noise_of(name) if observed else None
        summed_out = self.summed_out  # of this run, filled as it goes on

        def score(p: EnergyDistribution, x: Tensor) -> Tensor:
            if not (self.fresh_noise or objective.is_frozen or is_inside_elbo()):
                raise RuntimeError(
                    f"the surrogate of EBM site {name!r} draws fresh noise at every evaluation, so "
                    "its density is not a fixed target: freeze it first, "
                    "objective.freeze(model, *args)"
                )
            is_loss = not objective.is_likelihood
            if summed_out and is_loss and not self.fresh_noise:  # fresh: the ELBO has checked
                refuse_mixture(name, p, x, summed_out, event_made=event_made)
            log_z = self.log_normalizers.get(name)
            return objective.site_log_prob(
                name, p, x, noise=noise, observed=observed, log_z=log_z, mask=mask
            )

        return score

    def _objective(self, name: str) -> SurrogateObjective:
        if not isinstance(self.objectives, Mapping):
            return self.objectives
        if name not in self.objectives:
            raise ValueError(
                f"no objective for EBM site {name!r}; the given ones are for "
                f"{sorted(self.objectives)}"
            )
        return self.objectives[name]


def _mask_of(fn: Any, mask: Any) -> Tensor | None:
    """Returns which elements of the EBM inside ``fn`` count.

    All of them where none does, ``None`` where all do.

    Args:
        fn: The site's distribution with its wrappers.
        mask: What ``poutine.mask`` says of the site: ``None``, a bool, or a tensor over
            ``fn.batch_shape``.
    """
    found = mask_of(fn, mask)
    return (found | ~found.any()).bool() if isinstance(found, Tensor) else None


def surrogate(
    model: Callable[..., Any], objective: SurrogateObjective | Mapping[str, SurrogateObjective]
) -> Callable[..., Any]:
    """Returns ``model`` with its EBM sites scored by ``objective``.

    Args:
        model: A Pyro model with at least one ``EnergyDistribution`` site.
        objective: An objective, or one per site by name. For MCMC it must be frozen.

    Raises:
        NotImplementedError: When an EBM site depends on a latent that is summed out, unless the
            objective is a likelihood.
        RuntimeError: When the model is scored outside an ELBO with an objective that draws fresh
            noise.
        ValueError: When an EBM site has no objective.
    """
    return SurrogateMessenger(objective)(model)
