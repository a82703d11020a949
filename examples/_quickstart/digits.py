r"""Part 1: a generalized energy-based model of handwritten digits, against generators alone.

The model is :math:`dQ(x) = e^{-E(x)}\, d(G_\# \eta)(x) / Z`: a generator G spreads images, the
energy E reweights them. Learning has two phases.

1. *The game.* Both networks play KALE's game: the energy maximizes a lower bound on KL(data || law
   of G), the generator minimizes it. The average over the last few hundred steps is kept.
2. *The energy phase.* The generator rests; the energy goes on with a weaker gradient penalty.

During the game a strong penalty keeps the generator's gradients smooth, but leaves an energy that
weights all images alike; a weak one would let the bound rise until a few images carry all the
weight.

Every setting below was chosen on the validation rows with seeds that are not reported:
``quickstart.py --tune`` prints what was tried.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

import pyro_ebm as ebm
from pyro_ebm.chains import median_distance, mmd2
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.infer import KALE, FitResult

# Adversarial training wants a short memory of past gradients.
Adam = partial(torch.optim.Adam, betas=(0.5, 0.9))


@dataclass(frozen=True)
class Game:
    """Both networks learn: KALE's gradient penalty, and steps of the energy and the generator."""

    num_steps: int = 2000
    schedule: tuple[int, int] = (5, 1)
    lr: float = 5e-3
    penalty: float = 1.0


@dataclass(frozen=True)
class EnergyPhase:
    """The energy learns alone."""

    num_steps: int = 300
    lr: float = 1e-3
    penalty: float = 0.01


@dataclass(frozen=True)
class MMDTraining:
    """The generator learns alone, from MMD²."""

    num_steps: int = 6000
    lr: float = 3e-3
    batch_size: int = 128


@dataclass(frozen=True)
class Settings:
    """All that was chosen. Pixels lie in [0, 1]; the penalties are in nats and pixels squared."""

    latent_dim: int = 16
    width: int = 128
    batch_size: int = 256
    game: Game = Game()
    energy: EnergyPhase = EnergyPhase()
    rival: Game = Game(num_steps=3200, schedule=(2, 1), lr=2e-3)
    mmd: MMDTraining = MMDTraining()
    num_draws: int = 8000


class DigitModel(nn.Module):
    """A Pyro model of images with a generator and an energy; calling it on data observes them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        wide, deep = settings.width, settings.latent_dim
        self.generator = nn.Sequential(
            nn.Linear(deep, wide),
            nn.SiLU(),
            nn.Linear(wide, wide),
            nn.SiLU(),
            nn.Linear(wide, 64),
            nn.Sigmoid(),
            nn.Unflatten(-1, (8, 8)),
        )
        self.energy = MLPEnergy((8, 8), hidden=(wide, wide))
        self.prior = dist.Normal(0.0, 1.0).expand([deep]).to_event(1)

    @property
    def gebm(self) -> ebm.GeneralizedEBM:
        """The distribution of one image."""
        return ebm.GeneralizedEBM(self.generator, self.prior, self.energy, event_shape=(8, 8))

    def forward(self, x: Tensor) -> None:
        """Observes images of shape ``(N, 8, 8)``."""
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.gebm, obs=x)

    @torch.no_grad()
    def generate(self, z: Tensor) -> Tensor:
        """Returns the images of latents."""
        return self.generator(z)

    def prior_predictive(self) -> Tensor:
        """Draws one image: the model that NUTS samples."""
        return pyro.sample("x", self.gebm)


@dataclass
class Trained:
    """A trained model, its learning curves by phase, and what training took."""

    model: DigitModel
    curves: dict[str, FitResult]
    seconds: float


def play_game(data: Tensor, settings: Settings, game: Game, seed: int) -> Trained:
    """Trains by the game alone; with the energy dropped this is the rival of the same family."""
    pyro.set_rng_seed(seed)
    model = DigitModel(settings)
    result = play(model, data, game, settings.batch_size)
    return Trained(model, {"game": result}, result.seconds)


def add_energy_phase(played: Trained, data: Tensor, settings: Settings, seed: int) -> Trained:
    """Trains the energy of a copy further; what was played stays as it is."""
    pyro.set_rng_seed(seed)
    model = copy.deepcopy(played.model)
    result = sharpen(model, data, settings.energy, settings.batch_size)
    return Trained(model, {**played.curves, "energy": result}, played.seconds + result.seconds)


def train_gebm(data: Tensor, settings: Settings, seed: int) -> Trained:
    """Learns generator and energy together, then the energy alone."""
    return add_energy_phase(play_game(data, settings, settings.game, seed), data, settings, seed)


def play(model: DigitModel, data: Tensor, game: Game, batch_size: int) -> FitResult:
    """Lets generator and energy play; leaves their averages in place."""
    result = ebm.fit(
        model,
        data,
        KALE(gradient_penalty=game.penalty, schedule=game.schedule),
        optim=Adam,
        lr=game.lr,
        batch_size=batch_size,
        num_steps=game.num_steps,
        ema=0.995,
    )
    result.use_average()
    return result


def sharpen(model: DigitModel, data: Tensor, phase: EnergyPhase, batch_size: int) -> FitResult:
    """Lets the energy go on against a resting generator; leaves its average in place."""
    result = ebm.fit(
        model,
        data,
        KALE(gradient_penalty=phase.penalty),
        lr=phase.lr,
        batch_size=batch_size,
        num_steps=phase.num_steps,
        ema=0.99,
    )
    result.use_average()
    return result


def train_by_mmd(data: Tensor, settings: Settings, seed: int) -> Trained:
    """The hardest rival: a generator trained on the very discrepancy that will judge it."""
    pyro.set_rng_seed(seed)
    model, training = DigitModel(settings), settings.mmd
    optimizer = torch.optim.Adam(model.generator.parameters(), lr=training.lr)
    average = AveragedModel(model.generator, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    bandwidth, rows = median_distance(data), batches(data, training.batch_size)
    started, losses = time.perf_counter(), []
    for _ in tqdm(range(training.num_steps), desc="fit generator by MMD"):
        draws = model.generator(model.prior.sample((training.batch_size,)))
        loss = mmd2(draws, next(rows), bandwidth=bandwidth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model.generator)
        losses.append(loss.item())
    model.generator = average.module
    curve = FitResult(losses=losses, num_steps=len(losses))
    return Trained(model, {"MMD": curve}, time.perf_counter() - started)


def batches(data: Tensor, size: int) -> Iterator[Tensor]:
    """Yields shuffled rows for ever."""
    while True:
        yield data[torch.randperm(len(data))[:size]]
