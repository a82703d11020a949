"""How the settings of part 1 were chosen: MMD² to the validation rows, on seeds not reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

import pyro_ebm as ebm
from _quickstart import digits
from _quickstart.digits import EnergyPhase, Game, MMDTraining, Settings, Trained
from _quickstart.report import Report
from pyro_ebm.chains import median_distance, mmd2

SEEDS = (100, 101, 102)

# Games that lead to a GEBM: every energy phase is tried after the first, the default after all.
GAMES = [
    Game(),
    Game(penalty=3.0),
    Game(schedule=(2, 1)),
    Game(schedule=(10, 1)),
    Game(lr=2e-3),
]
ENERGY_PHASES = [
    EnergyPhase(),
    EnergyPhase(penalty=0.02),
    EnergyPhase(penalty=0.05),
    EnergyPhase(penalty=0.3),
    EnergyPhase(num_steps=150),
    EnergyPhase(num_steps=600),
]
# The generator alone. A larger batch makes fewer steps, so that all take about as long.
RIVALS = [
    Game(3200, schedule=(2, 1), lr=2e-3),
    Game(3200, schedule=(2, 1), lr=1e-3),
    Game(3200, schedule=(2, 1), lr=2e-3, penalty=0.3),
    Game(3200, schedule=(2, 1), penalty=3.0),
    Game(3200, schedule=(2, 1), penalty=1.0),
    Game(3200, schedule=(1, 1), penalty=3.0),
    Game(3200, schedule=(5, 1)),
]
MMD_TRAININGS = [
    MMDTraining(),
    MMDTraining(lr=1e-2),
    MMDTraining(9000, batch_size=64),
    MMDTraining(3500, batch_size=256),
    MMDTraining(1500, batch_size=512, lr=1e-2),
]


def tune(settings: Settings, report: Report) -> None:
    """Tries everything on every tuning seed and prints 1000 x MMD² to the validation rows."""
    data = ebm.datasets.digits()
    bandwidth = median_distance(data.train)
    scores: dict[str, list[float]] = {}
    for seed in SEEDS:
        for name, trained, law in candidates(data.train, settings, seed):
            with torch.no_grad():
                draws = law(trained.model).sample((settings.num_draws,))
            scores.setdefault(name, []).append(1e3 * mmd2(draws, data.valid, bandwidth=bandwidth))
            report(f"{scores[name][-1]:6.2f}  {trained.seconds:4.0f} s  {name}")
    report.heading("1000 x MMD² to the validation rows")
    cells = {
        name: [f"{x:.2f}" for x in (sum(row) / len(row), *row)] for name, row in scores.items()
    }
    header = ("", "mean", *(f"seed {seed}" for seed in SEEDS))
    report.table(header, [(name, *cells[name]) for name in sorted(scores, key=str)])


Law = Callable[[digits.DigitModel], TorchDistribution]


def candidates(train: Tensor, settings: Settings, seed: int) -> Iterator[tuple[str, Trained, Law]]:
    """Yields name, trained model, and which of its laws counts."""
    for game in GAMES:
        played = digits.play_game(train, settings, game, seed)
        for phase in ENERGY_PHASES if game == GAMES[0] else ENERGY_PHASES[:1]:
            trained = digits.add_energy_phase(played, train, replace(settings, energy=phase), seed)
            yield f"GEBM: {game}, {phase}", trained, lambda model: model.gebm
    for game in RIVALS:
        played = digits.play_game(train, settings, game, seed)
        yield f"generator alone: {game}", played, lambda model: model.gebm.base
    for training in MMD_TRAININGS:
        trained = digits.train_by_mmd(train, replace(settings, mmd=training), seed)
        yield f"generator alone: {training}", trained, lambda model: model.gebm.base
