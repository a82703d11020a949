r"""Persistent contrastive divergence: likelihood training by chains that never start over.

.. math:: L = U(x) - U(x^-), \qquad x^- \leftarrow T_\theta^k(x^-)

The chains go on from one training step to the next: as long as :math:`\theta` moves slowly they
stay near :math:`p_\theta`, and the gradient near the likelihood's. It is stochastic approximation:
with learning rates that fall to zero the limit is the maximum likelihood estimate, without a bias
of k steps as contrastive divergence has. The chains lag if the learning rate is too large. As with
contrastive divergence the value of the loss is no likelihood.

A share of restarts finds modes that no chain is in; restarted states are not draws of p, so it
bends what is learned, the more the fewer steps they move.

References:
    Younes, Parametric inference for imperfectly observed Gibbsian fields, 1989; Tieleman, Training
    restricted Boltzmann machines using approximations to the likelihood gradient, ICML 2008; Du,
    Mordatch, Implicit generation and modeling with energy-based models, 2019, arXiv:1903.08689.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.likelihood.chain_watch import MANY_USES
from pyro_ebm.infer.likelihood.counted_slots import CountedSlots
from pyro_ebm.infer.likelihood.negative_phase import NegativePhase, Start
from pyro_ebm.infer.likelihood.tempered_langevin import TemperedLangevin
from pyro_ebm.infer.likelihood.transitions import KernelFactory, Transition, replaced
from pyro_ebm.infer.scoring import conditional
from pyro_ebm.infer.scoring.contrast import Contrast, rows_of
from pyro_ebm.ops.arguments import share, whole


class PersistentContrastiveDivergence(NegativePhase):
    r"""PCD: every step moves some chains of a buffer on, and writes them back to their own slots.

    Its value is not a likelihood (``is_held_out_criterion`` is false). Evaluation without gradients
    moves copies: the chains are those of training alone. A site has a buffer of its own, which is
    saved with the objective's ``state_dict``.

    Args:
        num_steps: k, steps or sweeps at every use.
        kernel: As for :class:`ContrastiveDivergence`.
        transition: As for :class:`ContrastiveDivergence`.
        size: Chains of a site; as many as the first batch needs if not given, so that all move at
            every step. A buffer much larger than a batch moves a chain rarely.
        restart_prob: Share of the chains used that start afresh.
        start: Where they start: ``"base"``, the base or, without one, points spread over the
            support, where it is continuous over two standard deviations of the data to either side;
            ``"data"``, random rows of the batch; or a distribution. A guide site of the same name
            goes before it.
        num_negatives: M, chains beside every datum, over which U(x-) is averaged.
        energy_penalty: As for :class:`ContrastiveDivergence`.
        max_gap: As for :class:`ContrastiveDivergence`.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Attributes:
        chains: The buffer of every site, by name, with the states on the support.

    Raises:
        ValueError: If an argument is out of range, a batch needs more chains than there are, or the
            energy depends on row-wise values other than x.

    Warns:
        SurrogateWarning: As :class:`ContrastiveDivergence`; and if some chains have not moved over
            many uses, which bend what is learned however well the others do.

    Example:
        >>> from pyro_ebm.energies import Ising
        >>> from pyro_ebm.infer import fit
        >>> import pyro
        >>> def model(x):
        ...     coupling = pyro.param("coupling", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", EnergyDistribution(Ising(coupling, (3, 3))), obs=x)
        >>> data = Ising(0.2, (3, 3)).sample((500,))
        >>> options = {"lr": 0.02, "num_steps": 60, "disable_progbar": True}
        >>> result = fit(model, data, PersistentContrastiveDivergence(1), **options)
        >>> abs(pyro.param("coupling").item() - 0.2) < 0.1
        True
    """

    pools_rows = True  # any chain may stand beside any row

    def __init__(
        self,
        num_steps: int = 10,
        *,
        kernel: KernelFactory | None = None,
        transition: Transition | None = None,
        size: int | None = None,
        restart_prob: float = 0.0,
        start: Start | Distribution = "base",
        num_negatives: int = 1,
        energy_penalty: float = 0.0,
        max_gap: float = 1e4,
        **elbo: Any,
    ) -> None:
        super().__init__(
            num_steps,
            kernel=kernel,
            transition=transition,
            start=start,
            num_negatives=num_negatives,
            energy_penalty=energy_penalty,
            max_gap=max_gap,
            **elbo,
        )
        self.counts_as_likelihood = True  # its chains go on
        self.size = None if size is None else whole("size", size, least=1)
        self.restart_prob = share("restart_prob", restart_prob)
        self.chains: dict[str, CountedSlots] = {}

    @classmethod
    def igebm(
        cls,
        num_steps: int = 60,
        *,
        gradient_step: float = 10.0,
        noise_scale: float | tuple[float, float] = 0.005,
        max_gradient: float | None = 0.01,
        energy_penalty: float = 1.0,
        size: int = 10_000,
        restart_prob: float = 0.05,
        **options: Any,
    ) -> PersistentContrastiveDivergence:
        r"""Returns the objective with the settings of Du and Mordatch for images scaled to [0, 1].

        The chains do not sample p. Their effective temperature :math:`\sigma^2 / (2s)` is 1.25e-6
        at these settings, below that of p by as much, and their gradients are clipped: they are
        descents with a little noise. What is trained is a sampler; the energy ranks states and is
        no calibrated density.

        Args:
            num_steps: Steps at every use.
            gradient_step: :math:`s`, in squared units of x.
            noise_scale: :math:`\sigma`; ``(first, last)`` anneals it over the steps.
            max_gradient: Largest magnitude of a gradient's component that is followed.
            energy_penalty: :math:`\alpha`.
            size: Chains.
            restart_prob: Share of the chains used that start afresh.
            **options: Others of this class.

        Example:
            >>> PersistentContrastiveDivergence.igebm(num_steps=20).restart_prob
            0.05
        """
        kernel = partial(
            TemperedLangevin,
            gradient_step=gradient_step,
            noise_scale=noise_scale,
            anneal_steps=num_steps,
            max_gradient=max_gradient,
        )
        return cls(
            num_steps,
            kernel=kernel,
            energy_penalty=energy_penalty,
            size=size,
            restart_prob=restart_prob,
            **options,
        )

    def check_unconditional(
        self, name: str, p: EnergyDistribution, x: Tensor, known: Tensor | None
    ) -> None:
        """Raises ``ValueError`` if rows have laws of their own: a chain can follow one law only."""
        if p.conditional is False:
            return
        if p.conditional or conditional.depends_on_rows(p, x):
            raise ValueError(
                f"the energy of EBM site {name!r} depends on row-wise values other than x, and "
                f"{type(self).__name__} keeps the chains of one law: use ContrastiveDivergence, "
                "RankingNCE or EnergyDiscrepancy, or say conditional=False if this is wrong"
            )

    def keeps_log_normalizer(self, site: str) -> bool:
        """Whether a site may have one law only: chains cannot follow a latent that is random."""
        return True

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Moves chains on, as many as the rows need; copies where no gradients are asked for."""
        lead = torch.Size((self.num_negatives,)) + rows_of(p, x)
        buffer = self._buffer(lead.numel(), partial(self._fresh_pool, p, x, noise), x.device)
        which, restarts = self._chosen(buffer, lead.numel())
        fresh = self._fresh_pool(p, x, noise, lead.numel())  # always: a graph has no branches
        states = replaced(buffer.positions[which], fresh, restarts)  # type: ignore[index]
        moved = self.moved(p, x, states.reshape(lead + p.event_shape))
        lost = moved.lost.flatten()
        states = replaced(moved.x.reshape(states.shape), fresh, lost)
        if self.evaluation.has_graph:
            buffer.restart(which, restarts)
            buffer.write(which, states, lost=lost)
        self.note(moved, age=buffer.ages[which].double().reshape(lead))
        if p.base_measure == "lebesgue":  # a discrete law may be all but one state
            self.evaluation.note(stuck=(buffer.idle >= MANY_USES).double().mean())
        return Contrast(states.reshape(lead + p.event_shape))

    def _buffer(self, num: int, fresh: Any, device: torch.device) -> CountedSlots:
        """The site's chains; made at the first batch."""
        site = self.evaluation.site
        buffer = self.chains.get(site)
        if buffer is None:
            buffer = self._new_buffer(self.size or num)
            buffer.fill(fresh(buffer.size))
            if self.evaluation.has_graph:
                self.chains[site] = buffer
        buffer.to(device)
        return buffer

    def _new_buffer(self, size: int) -> CountedSlots:
        return CountedSlots(size, num_steps=self.num_steps, restart_prob=self.restart_prob)

    def _chosen(self, buffer: CountedSlots, num: int) -> tuple[Tensor, Tensor]:
        if self.evaluation.has_graph:
            return buffer.choose(num)
        which = torch.randint(buffer.size, (num,), device=buffer.ages.device)
        return which, torch.zeros_like(which, dtype=torch.bool)

    def _fresh_pool(self, p: EnergyDistribution, x: Tensor, noise: Any, num: int) -> Tensor:
        """Fresh states ``(num,) + event``, whichever rows they stand beside."""
        if self.starts_at_data(noise):
            rows = self.evaluation.rows(x, len(rows_of(p, x)))
            return rows[torch.randint(len(rows), (num,), device=x.device)]
        beside = math.ceil(num / max(1, rows_of(p, x).numel()))
        return self.fresh(p, x, noise, beside).reshape((-1,) + p.event_shape)[:num]

    # --- saving

    def get_extra_state(self) -> Any:
        """Returns the chains of every site too, which are part of the state as parameters are."""
        return {**super().get_extra_state(), "chains": self._saved_chains()}

    def _saved_chains(self) -> dict[str, Any]:
        return {site: buffer.state_dict() for site, buffer in self.chains.items()}

    def set_extra_state(self, state: Any) -> None:
        """Restores them."""
        super().set_extra_state(state)
        held, self.chains = self.chains, {}
        for site, saved in state["chains"].items():
            size = self.size or len(saved["ages"])
            has_room = site in held and held[site].size == size
            self.chains[site] = held[site] if has_room else self._new_buffer(size)
            self.chains[site].load_state_dict(saved)
