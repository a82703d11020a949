"""How the settings of part 1 were chosen: MMD² to the validation rows, on seeds not reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import pyro_ebm as ebm
from _quickstart.digits import (
    EnergyPhase,
    Game,
    MMDTraining,
    Settings,
    Trained,
    train_gebm,
    train_generator_by_kale,
    train_generator_by_mmd,
)
from _quickstart.report import Report
from pyro_ebm.chains import median_distance, mmd2

SEEDS = (100, 101, 102)


@dataclass(frozen=True)
class Candidate:
    """Something to be tried: what changes, how it is trained, and whether its energy counts."""

    name: str
    settings: Settings
    train: Callable[[Tensor, Settings, int], Trained]
    keeps_energy: bool


def candidates(own: Settings) -> list[Candidate]:
    """The settings in use and their neighbours, for the GEBM and for both rivals."""
    return [
        *(
            _gebm(own, f"energy phase {e.num_steps} steps, penalty {e.penalty}", energy=e)
            for e in ENERGIES
        ),
        *(_gebm(own, f"game {_words(g)}", game=g) for g in games(own.game.num_steps)[1:]),
        *(_kale(own, g) for g in games(own.rival.num_steps)),
        *(_mmd(own, m) for m in MMDS),
    ]


ENERGIES = [
    EnergyPhase(),
    EnergyPhase(penalty=0.02),
    EnergyPhase(penalty=0.1),
    EnergyPhase(penalty=1.0),
    EnergyPhase(num_steps=150),
    EnergyPhase(num_steps=600),
]
# Larger batches make fewer steps, so that all take about as long.
MMDS = [
    MMDTraining(),
    MMDTraining(lr=1e-3),
    MMDTraining(lr=1e-2),
    MMDTraining(num_steps=3500, batch_size=256),
    MMDTraining(num_steps=600, batch_size=1024),
]


def games(num_steps: int) -> list[Game]:
    """A game and its neighbours."""
    game = Game(num_steps)
    changes = (
        {"penalty": 0.3},
        {"penalty": 3.0},
        {"lr": 2e-3},
        {"schedule": (5, 1)},
        {"schedule": (1, 1)},
    )
    return [game, *(replace(game, **change) for change in changes)]


def _words(game: Game) -> str:
    return f"penalty {game.penalty}, lr {game.lr}, schedule {game.schedule}"


def _gebm(own: Settings, name: str, **change: Game | EnergyPhase) -> Candidate:
    return Candidate(f"GEBM, {name}", replace(own, **change), train_gebm, keeps_energy=True)


def _kale(own: Settings, game: Game) -> Candidate:
    settings = replace(own, rival=game)
    return Candidate(
        f"KALE alone, {_words(game)}", settings, train_generator_by_kale, keeps_energy=False
    )


def _mmd(own: Settings, training: MMDTraining) -> Candidate:
    name = f"MMD alone, batch {training.batch_size}, lr {training.lr}, {training.num_steps} steps"
    return Candidate(name, replace(own, mmd=training), train_generator_by_mmd, keeps_energy=False)


def tune(settings: Settings, report: Report) -> None:
    """Trains every candidate on every tuning seed and prints MMD² to the validation rows."""
    data = ebm.datasets.digits()
    bandwidth = median_distance(data.train)
    rows = []
    for candidate in candidates(settings):
        runs = [candidate.train(data.train, candidate.settings, seed) for seed in SEEDS]
        scores = [1e3 * _score(run, candidate, data.valid, bandwidth) for run in runs]
        seconds = sum(run.seconds for run in runs) / len(runs)
        cells = [f"{score:.2f}" for score in (sum(scores) / len(scores), *scores)]
        rows.append((candidate.name, *cells, f"{seconds:.0f}"))
        report("  ".join(rows[-1]))
    report.heading("1000 x MMD² to the validation rows")
    report.table(("", "mean", *(f"seed {seed}" for seed in SEEDS), "seconds"), rows)


@torch.no_grad()
def _score(run: Trained, candidate: Candidate, valid: Tensor, bandwidth: Tensor) -> float:
    law = run.model.gebm if candidate.keeps_energy else run.model.gebm.base
    return float(mmd2(law.sample((candidate.settings.num_draws,)), valid, bandwidth=bandwidth))
