"""Effect handlers: surrogates for EBM sites, latent reparametrization, the structural check."""

from pyro_ebm.poutine.latent_reparam import LatentReparam
from pyro_ebm.poutine.surrogate import surrogate

__all__ = ["LatentReparam", "surrogate"]
