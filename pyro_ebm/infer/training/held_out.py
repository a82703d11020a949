r"""Evaluating a criterion in the middle of a training without a trace of it in what follows.

Every point of a validation curve sees the same draws, so that points differ by the parameters
alone; modules are in evaluation mode, so that dropout does not add noise and buffers (running
means, the vectors of spectral norms) stay those of the training.

A training minimizes :math:`\frac1N \big( \sum_{i \le N} \ell_i + R \big)`, where R is what counts
once however many rows there are: :math:`\log q - \log p` of global latents, factors outside of
plates. On n held-out rows the criterion is

.. math:: \frac1N \Big( \frac Nn \sum_{j \le n} \ell_j + R \Big),

the same but for the rows, so that it is lowest at the posterior of N rows. Divided by n, R would
count N / n times, and the best posterior would be that of n rows. Without R the best one would have
no width. Where a guide draws global latents the criterion is a mean over ``NUM_DRAWS`` draws of
them: with a single one it would be lowest where that draw, not the guide, is best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_ebm.distributions.layers import is_point
from pyro_ebm.infer.training.early_stopping import check_latents, check_noise
from pyro_ebm.infer.training.minibatch import Batches, DryRun, PlateFactors, dry_run
from pyro_ebm.infer.training.stock_elbo import Loss
from pyro_ebm.ops.evaluation_mode import evaluation_mode
from pyro_ebm.ops.rng import rng_preserved

SEED = 20_231_113  # of the draws at every point
NUM_DRAWS = 32  # of global latents: a width is then judged to 1 / sqrt(2 * 32), an eighth of it


class HeldOutLoss:
    """An objective's loss on held-out rows, per datum in nats, weighed as the training's own.

    Args:
        objective: The loss.
        model: The model.
        guide: Its guide.
        data: The held-out rows, n of them.
        batches: What is trained on, N rows.

    Raises:
        ValueError: By ``prepare``, if the guide draws latents and no plate follows the rows; where
            something goes by the curve, if values at two points do not compare.
    """

    def __init__(
        self,
        objective: Loss,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: tuple[Tensor, ...],
        batches: Batches,
    ) -> None:
        self.objective, self.model, self.guide = objective, model, guide
        self.data, self.batches = data, batches
        self.num_rows = batches.num_rows
        self.num_passes = 1
        self.scaling = PlateFactors({})
        self.is_prepared = False
        self.reader: str | None = None
        self.first_noise: dict[str, Tensor] = {}

    def __call__(self) -> float:
        """Returns the loss, leaving the objective's diagnostics as they were."""
        kept = dict(self.objective.diagnostics)
        losses = [self._one_pass() for _ in range(self.num_passes)]
        self.objective.diagnostics = kept
        if self.reader is not None:
            self.first_noise = check_noise(self.objective, self.first_noise, self.reader)
        return math.fsum(losses) / self.num_passes / self.num_rows

    def _one_pass(self) -> float:
        with self.scaling:
            return float(self.objective.differentiable_loss(self.model, self.guide, *self.data))

    def prepare(self, trained: Mapping[str, int], reader: str | None = None) -> None:
        """Finds out which plates follow the rows and whether the guide draws latents.

        Args:
            trained: How many rows each plate stands for in the training, by name.
            reader: What goes by the curve, if anything does.
        """
        run = dry_run(self.model, self.guide, self.data)
        factors = self._factors(run, trained)
        latents = _latents(run)
        if reader is not None:
            check_latents(self.objective, latents, reader)
        if not factors and len(self.data[0]) != self.batches.num_rows:
            _check_nothing_counts_once(latents)
            self.num_rows = len(self.data[0])
        alike = {n for n, size in run.plates.sizes.items() if size == len(self.data[0])}
        over_rows = alike.union(factors)
        if any(_is_global(run.guide_trace.nodes[name], over_rows) for name in latents):
            self.num_passes = math.ceil(NUM_DRAWS / self.objective.num_particles)
        self.scaling, self.reader, self.is_prepared = PlateFactors(factors), reader, True

    def _factors(self, run: DryRun, trained: Mapping[str, int]) -> dict[str, float]:
        """How many times larger each plate over rows is in the training; of one size, no others."""
        if self.batches.plates is not None:
            return dict.fromkeys(self.batches.plates, self.batches.num_rows / len(self.data[0]))
        held = run.plates.full_sizes
        return {n: trained[n] / size for n, size in held.items() if trained.get(n, size) != size}


def _latents(run: DryRun) -> list[str]:
    """The guide's sites but for contrasts, which the model observes, and rows of a subsample."""
    return [
        name
        for name, site in run.guide_trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not run.model_trace.nodes.get(name, {}).get("is_observed", False)
    ]


def _is_global(site: Any, over_rows: Collection[str]) -> bool:
    """Whether a draw is shared by all rows."""
    shared = all(frame.name not in over_rows for frame in site["cond_indep_stack"])
    return shared and not is_point(site["fn"])


def _check_nothing_counts_once(latents: Collection[str]) -> None:
    if latents:
        raise ValueError(
            "validation: no plate of the model follows the number of rows, so that it is not known "
            f"what of its loss belongs to rows and what, such as the prior of {min(latents)!r}, "
            "counts once: use pyro.plate(name, len(x)), or give criterion="
        )


@contextmanager
def held_out(modules: Collection[nn.Module]) -> Iterator[None]:
    """Surrounds the evaluation of a criterion: no gradients, the same draws, evaluation mode.

    Args:
        modules: Those that take part; each of their submodules returns to its own mode.
    """
    with torch.no_grad(), rng_preserved(), evaluation_mode(modules):
        torch.manual_seed(SEED)
        yield
