"""Families whose log Z is known, for functions that may not know it."""

import torch
from torch.distributions import constraints

from pyro_ebm.energies import ExponentialFamily


class Precision(ExponentialFamily):
    """Centred Gaussians by their precision, drawn exactly; log Z = log(2 pi / precision) / 2."""

    coefficients = ("precision",)
    is_sampleable = True

    def __init__(self, precision):
        super().__init__((), constraints.real)
        self._set("precision", precision, positive=True)

    def statistics(self, x):
        return -0.5 * x.square().unsqueeze(-1)

    def sample(self, shape=()):
        precision = self.natural()[..., 0]
        return torch.randn(torch.Size(shape) + precision.shape) / precision.sqrt()


def log_z_of_precision(natural):
    return 0.5 * (2 * torch.pi / natural[..., 0]).log()
