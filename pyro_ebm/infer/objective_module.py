"""An objective as a torch module, for a torch or Lightning loop, on one process or several."""

from __future__ import annotations

import warnings
from typing import Any

from pyro.infer.elbo import ELBOModule

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

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yields the parameters of model, guide and objective.

        Warns:
            SurrogateWarning: Before the first call, while log Z does not exist yet and would be
                left out.
        """
        objective = self.elbo
        if (
            objective.learns_log_normalizer
            and objective.learns_by_gradient
            and not (objective._sites or objective.log_normalizers)
        ):
            warnings.warn(
                f"{type(objective).__name__} creates its log Z at the first batch: call it on data "
                "once before parameters(), or log Z is never optimized",
                SurrogateWarning,
                stacklevel=2,
            )
        return super().named_parameters(*args, **kwargs)
