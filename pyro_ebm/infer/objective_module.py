"""An objective as a torch module, for a torch or Lightning loop, on one process or several."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from pyro_ebm.errors import SurrogateWarning


class ObjectiveModule(ELBOModule):
    """An objective bound to a model and a guide, as ``ELBO.__call__`` returns.

    Its value is in nats for the whole data set: divide it by the number of rows before calling
    ``backward`` if learning rates are to mean the same at every size.

    **Lightning.** Make the module an attribute of the ``LightningModule``, return
    ``self.loss(batch) / len(batch)`` from ``training_step`` and ``self.loss.parameters()`` goes to
    the optimizer. If log Z is learned, call the module on a batch first, under ``no_grad``.

    **Data parallelism** (``torchrun``). Wrap the module, not the model::

        module = objective(model, guide)
        with torch.no_grad():
            module(rows)                                # log Z must exist; rank 0's is taken
        parallel = DistributedDataParallel(module, find_unused_parameters=True)
        (parallel(rows) / len(rows)).backward()         # rows: as many in every process

    Gradients are synchronised in this ``backward``, those of losses that differentiate the energy
    in x included. ``find_unused_parameters`` is needed because a score has no gradient in the
    energy's constants and a resting player none at all. Every process must draw noise of its own:
    seed it with its rank. What is a mean over rows, or over draws beside rows, is then the loss of
    one process with all rows. Two things are not: ``DonskerVaradhan`` takes the logarithm of a mean
    over the draws of one process, so that its bias is that of the smaller batch; and a log Z that
    is not learned by gradient (``c_update="closed_form"``) is a running average of the process's
    own rows: take ``"gradient"``.
    """

    _listed: frozenset[str] | None = None  # what the last list held of the objective itself

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yields the parameters of model, guide and objective that exist by now."""
        self._listed = frozenset(name for name, _ in self.elbo.named_parameters())
        return super().named_parameters(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss in nats for the whole data set.

        Warns:
            SurrogateWarning: If log Z of a site exists only now that training has begun, so that an
                optimizer made of ``parameters()`` leaves it out.
        """
        loss = super().forward(*args, **kwargs)
        if self._listed is not None and torch.is_grad_enabled():
            self._warn_of_late(self._listed)
            self._listed = None
        return loss

    def _warn_of_late(self, listed: frozenset[str]) -> None:
        own = self.elbo.named_parameters()
        late = [name for name, p in own if p.requires_grad and name not in listed]
        if late:
            sites = ", ".join(repr(name.rsplit(".", 1)[-1]) for name in late)
            warnings.warn(
                f"{type(self.elbo).__name__} creates its log Z at the first batch, and that of EBM "
                f"site {sites} was not yet in parameters() when they were asked for: call the "
                "module on data once before parameters(), or log Z is never optimized",
                SurrogateWarning,
                stacklevel=3,
            )
