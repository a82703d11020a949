"""NUTS in the latent space of the digits: chains, their diagnostics, and a check of quick draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import MCMC
from torch import Tensor
from tqdm.auto import tqdm

import pyro_ebm as ebm
from _quickstart.digits import DigitModel
from pyro_ebm.chains import Diagnosis, summary
from pyro_ebm.mcmc import RecordingNUTS

CHUNK = 2000


@dataclass
class Chains:
    """Draws of one latent law by two samplers.

    Args:
        mcmc: The finished NUTS run.
        latents: Its draws, ``(chains, draws, d)``.
        energies: The model's energy at these.
        diagnosis: How the chains mixed.
        independent: The last states of many short chains, ``(n, d)``.
    """

    mcmc: MCMC
    latents: Tensor
    energies: Tensor
    diagnosis: Diagnosis
    independent: Tensor


def sample(
    model: DigitModel,
    *,
    num_samples: int,
    warmup_steps: int,
    num_independent: int,
    seed: int,
) -> Chains:
    """Runs Pyro's NUTS on the latent of the site ``x``, four chains, and many short chains."""
    pyro.set_rng_seed(seed)
    latent_model = poutine.reparam(model.prior_predictive, {"x": ebm.LatentReparam()})
    mcmc = MCMC(
        RecordingNUTS(latent_model, max_tree_depth=7),
        num_samples=num_samples,
        warmup_steps=warmup_steps,
        num_chains=4,
    )
    mcmc.run()
    law = model.gebm.latent
    pyro.set_rng_seed(seed)  # the comparison does not depend on how long NUTS ran
    independent = draw_in_chunks(law, num_independent)
    latents = mcmc.get_samples(group_by_chain=True)["x_latent"]
    with torch.no_grad():
        energies = law.energy(latents)
    return Chains(mcmc, latents, energies, ebm.diagnose(mcmc), independent)


def draw_in_chunks(law: TorchDistribution, num: int) -> Tensor:
    """Draws with a progress bar."""
    sizes = [min(CHUNK, num - start) for start in range(0, num, CHUNK)]
    return torch.cat([law.sample((size,)) for size in tqdm(sizes, desc="draw from the GEBM")])


def save_arviz(chains: Chains, model: DigitModel, path: Path) -> None:
    """Writes latents, images and statistics of every transition as NetCDF, for ArviZ."""
    data = ebm.to_arviz(
        chains.mcmc,
        posterior_predictive={"x": model.generate(chains.latents).flatten(0, 1)},
        dims={"x_latent": ["latent"], "x": ["row", "column"]},
    )
    data.to_netcdf(path)


def disagreement(chains: Chains, model: DigitModel) -> tuple[float, int]:
    """Compares means over NUTS draws with means over the independent draws.

    Returns:
        The largest z-score in absolute value, and the number of statistics compared: the energy,
        every latent coordinate and its square.
    """
    draws = chains.independent
    with torch.no_grad():
        energies = model.gebm.latent.energy(draws)
    ours = {"energy": chains.energies, "z": chains.latents, "z2": chains.latents.square()}
    table = summary({name: values.numpy() for name, values in ours.items()})
    theirs = torch.cat([energies[:, None], draws, draws.square()], 1)
    stderr = np.hypot(table["mcse_mean"], theirs.std(0).numpy() / math.sqrt(len(draws)))
    z = (table["mean"] - theirs.mean(0).numpy()) / stderr
    return float(np.abs(z).max()), len(z)
