"""NUTS in the latent space of the digits: chains, their diagnostics, and a check of quick draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer import MCMC
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.chains import summary
from pyro_ebm.mcmc import RecordingNUTS


@dataclass
class Chains:
    """A finished run: latents ``(chains, draws, d)``, the model's energies, the worst
    diagnostics.
    """

    latents: Tensor
    energies: NDArray[Any]
    diagnosis: ebm.chains.Diagnosis
    mcmc: MCMC


def run_nuts(model: Any, *, num_samples: int, warmup_steps: int, seed: int) -> Chains:
    """Runs Pyro's NUTS on the latent of the site ``x``, four chains."""
    pyro.set_rng_seed(seed)
    latent_model = poutine.reparam(model.prior_predictive, {"x": ebm.LatentReparam()})
    kernel = RecordingNUTS(latent_model, max_tree_depth=7)
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=warmup_steps, num_chains=4)
    mcmc.run()
    latents = mcmc.get_samples(group_by_chain=True)["x_latent"]
    with torch.no_grad():
        energies = model.gebm.latent.energy(latents).numpy()
    return Chains(latents, energies, ebm.diagnose(mcmc), mcmc)


def save_arviz(chains: Chains, model: Any, path: Path) -> None:
    """Writes latents, images and statistics of every transition as NetCDF, for ArviZ."""
    with torch.no_grad():
        images = model.generator(chains.latents).flatten(0, 1)
    data = ebm.to_arviz(
        chains.mcmc,
        posterior_predictive={"x": images},
        dims={"x_latent": ["latent"], "x": ["row", "column"]},
    )
    data.to_netcdf(path)


def disagreement(chains: Chains, model: Any, draws: Tensor) -> tuple[float, int]:
    """Compares means over NUTS draws with means over independent draws of ``latent.sample``.

    Args:
        chains: The NUTS run.
        model: The model of both.
        draws: Independent latents, ``(n, d)``.

    Returns:
        The largest z-score in absolute value, and the number of statistics compared: the energy,
        every latent coordinate and its square.
    """
    with torch.no_grad():
        energy = model.gebm.latent.energy(draws)
    both = {
        "energy": (chains.energies, energy),
        "z": (chains.latents, draws),
        "z2": (chains.latents.square(), draws.square()),
    }
    table = summary({name: np.asarray(ours) for name, (ours, _) in both.items()})
    theirs = torch.cat([quick.reshape(len(draws), -1) for _, quick in both.values()], 1)
    stderr = np.hypot(table["mcse_mean"], theirs.std(0).numpy() / math.sqrt(len(draws)))
    z = (table["mean"] - theirs.mean(0).numpy()) / stderr
    return float(np.abs(z).max()), len(z)
