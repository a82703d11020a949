"""Effect handlers: surrogates for EBM sites, latent reparametrization, the structural check."""

from pyro_ebm.poutine.check_model import check_model
from pyro_ebm.poutine.gradient_check import GradientCheck
from pyro_ebm.poutine.latent_reparam import LatentReparam
from pyro_ebm.poutine.site_check import ModelCheck, SiteCheck
from pyro_ebm.poutine.surrogate import surrogate

__all__ = [
    "GradientCheck",
    "LatentReparam",
    "ModelCheck",
    "SiteCheck",
    "check_model",
    "surrogate",
]
