"""Energy and generator take turns: who rests does not move by a bit, under every loop and with
momentum.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, PushforwardDistribution
from pyro_ebm.infer import KALE, DonskerVaradhan, fit

SCHEDULE = (2, 1)
TURNS = ["energy", "energy", "generator"] * 3


class Game:
    """A GEBM on the plane, its two networks, and a bystander that belongs to neither."""

    def __init__(self, *, in_guide):
        self.energy = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 1))
        self.generator = nn.Linear(2, 2)
        self.bystander = nn.Parameter(torch.zeros(2))
        self.data = torch.randn(30, 2) + 1.0
        self.prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        self.in_guide = in_guide

    def score(self, x):
        return self.energy(x).squeeze(-1)

    def model(self, x):
        pyro.module("energy", self.energy)
        bystander = pyro.param("bystander", self.bystander)
        with pyro.plate("data", len(x)):
            if self.in_guide:
                ebm = EnergyDistribution(self.score, event_shape=(2,))
            else:
                pyro.module("generator", self.generator)
                ebm = GeneralizedEBM(self.generator, self.prior, self.score)
            pyro.sample("x", ebm, obs=x)
            pyro.sample("y", dist.Normal(bystander, 1.0).to_event(1), obs=x)

    def guide(self, x):
        if self.in_guide:
            pyro.module("generator", self.generator)
            with pyro.plate("data", len(x)):
                pyro.sample("x", PushforwardDistribution(self.generator, self.prior))

    @property
    def players(self):
        return {
            "energy": list(self.energy.parameters()),
            "generator": list(self.generator.parameters()),
            "bystander": [self.bystander],
        }

    def state(self):
        flat = {name: [p.detach().flatten() for p in ps] for name, ps in self.players.items()}
        return {name: torch.cat(parts).clone() for name, parts in flat.items()}


@pytest.fixture(params=[False, True], ids=["in the model", "in the guide"])
def game(request):
    return Game(in_guide=request.param)


def with_svi(game, objective, steps):
    svi = SVI(game.model, game.guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
    for _ in range(steps):
        svi.step(game.data)
        yield game.state()


def with_torch(game, objective, steps):
    module = objective(game.model, game.guide)
    with torch.no_grad():
        module(game.data)
    own = [p for ps in game.players.values() for p in ps]
    optim = torch.optim.Adam([*own, *objective.parameters()], lr=0.05)
    for _ in range(steps):
        optim.zero_grad()
        module(game.data).backward()
        optim.step()
        yield game.state()


def with_fit(game, objective, steps):
    seen = []

    class Watched(torch.optim.Adam):
        def step(self, *args):
            super().step(*args)
            seen.append(game.state())

    fit(
        game.model,
        game.data,
        objective,
        guide=game.guide,
        optim=Watched,
        lr=0.05,
        num_steps=steps,
        disable_progbar=True,
    )
    return seen


LOOPS = {"svi": with_svi, "torch": with_torch, "fit": with_fit}
OBJECTIVES = {
    "kale": lambda: KALE(schedule=SCHEDULE, gradient_penalty=0.1),
    "kale, learned c": lambda: KALE(schedule=SCHEDULE, c_update="gradient"),
    "dv": lambda: DonskerVaradhan(schedule=SCHEDULE),
}


def moves(states):
    """Returns, step by step, who moved."""
    return [
        {name for name in now if not torch.equal(now[name], before[name])}
        for before, now in zip(states, states[1:], strict=False)
    ]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_resting_player_is_bit_equal(game, loop, name):
    states = [game.state(), *LOOPS[loop](game, OBJECTIVES[name](), len(TURNS))]
    assert moves(states) == [{turn, "bystander"} for turn in TURNS]


def test_zero_gradients_would_move_it():
    """The same game where a rest means zeros instead of no gradient: Adam's momentum carries on."""

    class ZeroGradients(KALE):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
            loss.backward()
            return float(loss.detach())

    game = Game(in_guide=False)
    states = [game.state(), *with_svi(game, ZeroGradients(schedule=SCHEDULE), len(TURNS))]
    assert moves(states)[2] == {"energy", "generator", "bystander"}


def test_stale_gradients_would_drive_it():
    """Alternating two losses by hand: the energy's step leaves a gradient that the generator's step
    adds up.
    """
    game = Game(in_guide=False)
    free = pyro.optim.Adam({"lr": 0.05})
    energy = SVI(game.model, game.guide, free, loss=KALE())
    energy.step(game.data)
    before = game.state()
    generator = KALE(schedule=(0, 1))
    loss = generator.differentiable_loss(game.model, game.guide, game.data)
    loss.backward()
    free({*game.players["energy"], *game.players["generator"]})
    assert not torch.equal(game.state()["energy"], before["energy"])


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_gradients_go_to_one_player(game, penalty):
    objective = KALE(schedule=(1, 1), gradient_penalty=penalty)
    for turn, rests in [("energy", "generator"), ("generator", "energy")]:
        for p in [*game.energy.parameters(), *game.generator.parameters()]:
            p.grad = torch.ones_like(p)  # stale
        objective.loss_and_grads(game.model, game.guide, game.data)
        assert all(p.grad is None for p in game.players[rests])
        got = torch.cat([p.grad.flatten() for p in game.players[turn] if p.grad is not None])
        assert got.abs().max() > 0


def test_flags_are_never_toggled(game):
    objective = KALE(schedule=(1, 1))
    seen = []
    inner = objective.site_loss

    def watched(*args):
        seen.append([p.requires_grad for ps in game.players.values() for p in ps])
        loss = inner(*args)
        seen.append([p.requires_grad for ps in game.players.values() for p in ps])
        return loss

    objective.site_loss = watched
    for _ in range(2):
        objective.loss_and_grads(game.model, game.guide, game.data)
    assert all(all(flags) for flags in seen)
    assert len(seen) == 4


def test_log_z_rests_with_the_energy(game):
    objective = KALE(schedule=SCHEDULE)
    values = []
    for _ in with_svi(game, objective, len(TURNS)):
        values.append(objective.log_normalizers["x"].item())
    assert [now != before for before, now in zip(values, values[1:], strict=False)] == [
        turn == "energy" for turn in TURNS[1:]
    ]


def test_evaluation_is_the_energys_and_does_not_count(game):
    objective = KALE(schedule=(0, 1))
    svi = SVI(game.model, game.guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
    svi.evaluate_loss(game.data)
    assert int(objective.num_steps_taken) == 0
    assert "bound" in objective.diagnostics["x"]
    svi.step(game.data)
    assert int(objective.num_steps_taken) == 1
    assert "generator_loss" in objective.diagnostics["x"]


def test_particles_share_a_turn(game):
    objective = KALE(schedule=(1, 1), num_particles=3)
    states = [game.state(), *with_svi(game, objective, 4)]
    assert moves(states) == [{turn, "bystander"} for turn in ["energy", "generator"] * 2]


def test_turn_is_part_of_the_state(game):
    first = KALE(schedule=SCHEDULE)
    list(with_svi(game, first, 2))
    second = KALE(schedule=SCHEDULE)
    second.load_state_dict(first.state_dict())
    states = [game.state(), *with_svi(game, second, 2)]
    assert moves(states) == [{"generator", "bystander"}, {"energy", "bystander"}]


def test_curves_of_a_fit_belong_to_their_steps(game):
    """Each diagnostic has one value per step of the player that makes it, validation in between or
    not.
    """
    result = fit(
        game.model,
        game.data,
        KALE(),
        guide=game.guide,
        schedule=SCHEDULE,
        num_steps=len(TURNS),
        validation=game.data[:10],
        validate_every=1,
        disable_progbar=True,
    )
    assert len(result.losses) == len(TURNS)
    assert len(result.diagnostics["x/bound"]) == TURNS.count("energy")
    assert len(result.diagnostics["x/generator_loss"]) == TURNS.count("generator")
    assert result.diagnostic_steps["x/generator_loss"] == [3, 6, 9]
    turns = [step for step, player in enumerate(TURNS, 1) if player == "generator"]
    assert result.diagnostic_steps["x/generator_loss"] == turns


def test_generator_learns():
    """Data N((1, 1), I) and a generator that starts at N(0, I): it is pulled to the data's mean.

    At 60 turns of 0.05 each its centre could have gone three units; the mean of 400 rows is known
    to 0.05.
    """
    game = Game(in_guide=False)
    game.data = torch.randn(400, 2) + 1.0
    with torch.no_grad():
        game.generator.weight.copy_(torch.eye(2))
        game.generator.bias.zero_()
    objective = KALE(schedule=(3, 1), gradient_penalty=0.05)
    list(with_svi(game, objective, 240))
    centre = game.generator.bias.detach()
    assert (centre - 1.0).abs().max() < 0.4
