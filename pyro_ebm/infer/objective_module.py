"""An objective as a torch module, for a torch or Lightning loop."""

from __future__ import annotations

import warnings
from typing import Any

from pyro.infer.elbo import ELBOModule

from pyro_ebm.errors import SurrogateWarning


class ObjectiveModule(ELBOModule):
    """An objective bound to a model and a guide, as ``ELBO.__call__`` returns."""

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
