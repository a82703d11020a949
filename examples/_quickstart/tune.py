"""How the settings of part 1 were chosen: MMD² to the validation rows, on seeds not reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pyro_ebm as ebm
import torch
from pyro_ebm.chains import median_distance, mmd2
from torch import Tensor

from _quickstart import digits
from _quickstart.digits import EnergyPhase, Game, MMDTraining, Settings, Trained
from _quickstart.report import Report

SEEDS = (100, 101, 102)

GAMES = [
    Game(),
    Game(penalty=3.0),
    Game(penalty=0.3),
    Game(lr=2e-3),
    Game(schedule=(5, 1)),
    Game(schedule=(1, 1)),
]
ENERGY_PHASES = [
    EnergyPhase(),
    EnergyPhase(penalty=0.01),
    EnergyPhase(penalty=0.05),
    EnergyPhase(penalty=0.3),
    EnergyPhase(num_steps=150),
    EnergyPhase(num_steps=600),
]
# A larger batch makes fewer steps, so that all take about as long.
MMD_TRAININGS = [
    MMDTraining(),
    MMDTraining(lr=1e-3),
    MMDTraining(lr=1e-2),
    MMDTraining(num_steps=3500, batch_size=256),
    MMDTraining(num_steps=600, batch_size=1024),
]


class Tuning:
    """Scores by candidate, printed as they come.

    Args:
        settings: What the candidates depart from.
        report: Where to print.
    """

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings, self.report = settings, report
        self.data = ebm.datasets.digits()
        self.bandwidth = median_distance(self.data.train)
        self.scores: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """Trains every candidate on every seed."""
        for seed in SEEDS:
            played = self.play(GAMES[0], seed)
            for phase in ENERGY_PHASES:
                settings = replace(self.settings, energy=phase)
                trained = digits.add_energy_phase(played, self.data.train, settings, seed)
                self.note(f"GEBM after the first game, {phase}", trained, keeps_energy=True)
            for game in GAMES[1:]:
                self.play(game, seed)
            for training in MMD_TRAININGS:
                settings = replace(self.settings, mmd=training)
                trained = digits.train_generator_by_mmd(self.data.train, settings, seed)
                self.note(str(training), trained, keeps_energy=False)

    def play(self, game: Game, seed: int) -> Trained:
        """Trains by one game; scores its generator alone and with an energy phase."""
        longer = replace(game, num_steps=LENGTH_OF_RIVAL)
        rival = digits.train_generator_by_kale(
            self.data.train, replace(self.settings, game=longer), seed
        )
        self.note(f"generator alone, {longer}", rival, keeps_energy=False)
        return rival

    def note(self, name: str, trained: Trained, *, keeps_energy: bool) -> None:
        """Keeps and prints one score: 1000 x MMD² to the validation rows."""
        score = 1e3 * self.score(trained, keeps_energy=keeps_energy)
        self.scores.setdefault(name, []).append(score)
        self.seconds[name] = trained.seconds
        self.report(f"{score:6.2f}  {trained.seconds:4.0f} s  {name}")
