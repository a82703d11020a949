"""The figure of the quickstart: images, training, energies, chains, and the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from _quickstart.digits import Trained
from _quickstart.latent import Chains
from _quickstart.plane import Corrected
from pyro_ebm.chains import MMDInterval
from pyro_ebm.plots import PALETTE, plot_energy_histogram, plot_images, plot_rank, plot_training

GRID = (7, 7)


@dataclass
class DigitsRun:
    """What one seed of part 1 leaves behind.

    Args:
        gebm: The trained model with its curves.
        images: Name to images of every law, training data first.
        held_out: Digits that were not trained on.
        chains: The NUTS run.
        discrepancies: Name to squared MMD on the test rows.
        gains: Name of a generator to the GEBM's gain over it.
    """

    gebm: Trained
    images: dict[str, Tensor]
    held_out: Tensor
    chains: Chains
    discrepancies: dict[str, MMDInterval]
    gains: dict[str, MMDInterval]


def draw_figure(path: Path, run: DigitsRun, corrected: Sequence[Corrected]) -> None:
    """Draws everything of one seed into one file."""
    figure, axes = plt.subplots(3, 4, figsize=(17, 12.5), layout="constrained")
    for ax, (name, sample) in zip(axes[0], run.images.items(), strict=False):
        plot_images(ax, sample[: GRID[0] * GRID[1]], GRID).set_title(name)
    _training(axes[1, 0], run.gebm)
    _energies(axes[1, 1], run)
    plot_rank(axes[1, 2], run.chains.energies).set_title("ranks of the energy in four NUTS chains")
    _discrepancies(axes[1, 3], run.discrepancies)
    for ax, found in zip(axes[2, ::2], corrected, strict=True):
        _plane(ax, found)
    for ax, found in zip(axes[2, 1::2], corrected, strict=True):
        _masses(ax, found)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _training(ax: Any, gebm: Trained) -> None:
    for color, (name, curve) in zip(PALETTE, gebm.curves.items(), strict=False):
        plot_training(ax, curve, curve="x/bound", label=name, color=color)
    ax.set(title="KALE's bound on KL(data || generator)", ylabel="nats")
    ax.legend()


@torch.no_grad()
def _energies(ax: Any, run: DigitsRun) -> None:
    images = {
        "held-out data": run.held_out,
        "generator": run.images["generator"],
        "GEBM": run.images["GEBM"],
    }
    energies = {name: run.gebm.model.energy(x) for name, x in images.items()}
    plot_energy_histogram(ax, energies).set_title("energy of digits")


def _discrepancies(ax: Any, discrepancies: Mapping[str, MMDInterval]) -> None:
    for place, (name, found) in enumerate(discrepancies.items()):
        color = PALETTE[place % len(PALETTE)]
        ax.plot([1e3 * found.lower, 1e3 * found.upper], [place, place], color=color, linewidth=3)
        ax.plot(1e3 * found.value, place, "o", color=color)
        ax.annotate(
            name, (1e3 * found.value, place), (0, 8), textcoords="offset points", ha="center"
        )
    ax.axvline(0.0, color="grey", linewidth=0.8)
    ax.set(title="MMD² to the test rows, 95 % intervals", yticks=[], xlabel="1000 x MMD²")
    ax.set_ylim(len(discrepancies) - 0.3, -0.7)


def _plane(ax: Any, found: Corrected) -> None:
    shift = torch.tensor([6.0, 0.0])
    for k, draws in enumerate((found.generator_draws, found.gebm_draws)):
        ax.scatter(*(draws[:3000] + k * shift).T, s=1, color=PALETTE[1 + k], rasterized=True)
    ax.set(title=f"{found.problem.name}: generator (left), GEBM (right)", aspect="equal")
    ax.set(xticks=[], yticks=[])


def _masses(ax: Any, found: Corrected) -> None:
    modes = torch.arange(found.problem.num_modes)
    ax.plot(modes, found.generator_mass, "o", color=PALETTE[1], label="generator")
    ax.plot(modes, found.gebm_mass, "o", color=PALETTE[2], label="GEBM")
    ax.axhline(found.truth, color="black", linewidth=1, label="data")
    ax.set(title=f"{found.problem.name}: mass of each mode", xlabel="mode")
    ax.set_ylim(bottom=0.0)
    ax.legend()
