"""Flow contrastive estimation: both players' gradients by quadrature, whose turn it is, and that
log Z stays log Z while the noise moves.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import SVI
from torch import nn
from torch.nn.functional import softplus

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.infer import NCE
from pyro_ebm.infer.noise.flow_contrastive import FlowContrastive
from pyro_ebm.infer.training.fit import fit

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
Z = torch.linspace(-9.0, 9.0, 1201, dtype=torch.float64)
WEIGHTS = torch.softmax(-0.5 * Z**2, 0)


def no_guide(*args):
    return None


class Nodes(dist.Normal):
    """A standard normal whose draws are the nodes of a quadrature."""

    def __init__(self):
        super().__init__(torch.zeros(()), torch.ones(()))

    def rsample(self, sample_shape=()):
        return Z.expand(*sample_shape, len(Z))

    sample = rsample

    def expand(self, batch_shape, _instance=None):
        return self


def flow(alpha):
    """N(alpha_0, exp(alpha_1)^2), drawn at the nodes."""
    return dist.TransformedDistribution(Nodes(), [T.AffineTransform(alpha[0], alpha[1].exp())])


def gaussian(a, b=0.0):
    return EnergyDistribution(lambda x: 0.5 * a * (x - b) ** 2, event_shape=())


def jensen_shannon(alpha):
    """JSD between the flow and N(0, 1) by the trapezoid rule, on a grid of its own."""
    x = torch.linspace(-14.0, 14.0, 6001)
    q = dist.Normal(alpha[0], alpha[1].exp()).log_prob(x)
    p = dist.Normal(0.0, 1.0).log_prob(x)
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum() * (x[1] - x[0])


def flow_loss(objective, p, alpha, c):
    """The expected loss of the flow, data N(0, 1)."""
    return (WEIGHTS * objective.second_player(p, Z, flow(alpha), c)).sum()


# --- the flow's loss


def test_flow_descends_the_jensen_shannon_divergence():
    """Where the model is the data's law, the loss is 2 JSD - 2 log 2, and so is its gradient."""
    alpha = torch.tensor([0.6, 0.3], requires_grad=True)
    loss = flow_loss(FlowContrastive(), gaussian(1.0), alpha, torch.tensor(HALF_LOG_2PI))
    exact = 2 * jensen_shannon(alpha) - 2 * math.log(2)
    assert loss.item() == pytest.approx(exact.item(), abs=1e-9)
    (have,), (want,) = (torch.autograd.grad(value, alpha) for value in (loss, exact))
    torch.testing.assert_close(have, want, rtol=0, atol=1e-8)
    assert want.abs().min() > 0.05


def test_flow_descends_the_games_value():
    """For any energy and c: the derivative of the integral of V."""
    alpha, c = torch.tensor([0.6, 0.3], requires_grad=True), 1.1
    x = torch.linspace(-14.0, 14.0, 6001)
    log_q = dist.Normal(alpha[0], alpha[1].exp()).log_prob(x)
    logit = -0.5 * 0.7 * (x - 0.4) ** 2 - c - log_q
    data = dist.Normal(0.0, 1.0).log_prob(x).exp()
    exact = -(data * softplus(-logit) + log_q.exp() * softplus(logit)).sum() * (x[1] - x[0])
    loss = flow_loss(FlowContrastive(), gaussian(0.7, 0.4), alpha, torch.tensor(c))
    assert loss.item() == pytest.approx(exact.item(), abs=1e-9)
    (have,), (want,) = (torch.autograd.grad(value, alpha) for value in (loss, exact))
    torch.testing.assert_close(have, want, rtol=0, atol=1e-8)


def test_likelihood_term():
    """Alone it is the cross entropy; in sums it enters by its weight."""
    alpha, c = torch.tensor([0.6, 0.3]), torch.tensor(HALF_LOG_2PI)
    likelihood = HALF_LOG_2PI + 0.3 + 0.5 * (1 + 0.36) * math.exp(-0.6)
    p = gaussian(1.0)
    alone = FlowContrastive(mle_weight=1.0, adversarial_weight=0.0)
    assert flow_loss(alone, p, alpha, c).item() == pytest.approx(likelihood, abs=1e-9)
    game = flow_loss(FlowContrastive(), p, alpha, c).item()
    both = FlowContrastive(mle_weight=0.3, adversarial_weight=2.0)
    have = flow_loss(both, p, alpha, c).item()
    assert have == pytest.approx(2 * game + 0.3 * likelihood, abs=1e-9)


def test_energy_is_held_in_the_flows_loss():
    a, alpha = torch.tensor(1.2, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = flow_loss(FlowContrastive(), gaussian(a), alpha, torch.tensor(0.5))
    assert torch.autograd.grad(loss, a, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(loss, alpha)[0].abs().max() > 1e-3


# --- the energy's loss


class Game:
    """A quadratic energy on the plane and a coupling flow in the guide."""

    def __init__(self):
        pyro.clear_param_store()  # a second game has weights of its own
        pyro.set_rng_seed(6)
        self.shape = nn.Parameter(torch.tensor([1.0, 0.0, 1.0]))
        self.coupling = T.affine_coupling(2, [6])
        self.last = T.affine_coupling(2, [6])
        self.data = torch.randn(200, 2) @ torch.tensor([[0.9, 0.3], [0.0, 0.7]])

    def energy(self, x):
        a, b, d = self.shape
        return 0.5 * (a * x[..., 0] ** 2 + d * x[..., 1] ** 2) + b * x[..., 0] * x[..., 1]

    def log_z(self):
        a, b, d = self.shape.detach()
        return math.log(2 * math.pi) - 0.5 * (a * d - b**2).log()

    def model(self, x):
        pyro.param("shape", self.shape)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(self.energy, event_shape=(2,)), obs=x)

    def law(self):
        swap = T.Permute(torch.tensor([1, 0]))
        start = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        return dist.TransformedDistribution(start, [self.coupling, swap, self.last])

    def guide(self, x):
        pyro.module("coupling", self.coupling)
        pyro.module("last", self.last)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.law())

    @property
    def players(self):
        flows = [*self.coupling.parameters(), *self.last.parameters()]
        return {"energy": [self.shape], "flow": flows}

    def state(self):
        return {n: nn.utils.parameters_to_vector(ps).clone() for n, ps in self.players.items()}

    def gradients(self, objective, seed=1):
        for p in [p for ps in self.players.values() for p in ps]:
            p.grad = None
        pyro.set_rng_seed(seed)
        objective.loss_and_grads(self.model, self.guide, self.data)
        return {
            name: [None if p.grad is None else p.grad.clone() for p in ps]
            for name, ps in self.players.items()
        }


def moves(game, objective, steps):
    """Returns, step by step, who moved under Adam."""
    svi = SVI(game.model, game.guide, pyro.optim.Adam({"lr": 0.02}), loss=objective)
    found, before = [], game.state()
    for _ in range(steps):
        svi.step(game.data)
        now = game.state()
        found.append({name for name in now if not torch.equal(now[name], before[name])})
        before = now
    return found


def test_energys_turn_is_nce_with_one_draw():
    game = Game()
    losses = []
    for objective in (FlowContrastive(), NCE(num_noise=1)):
        pyro.set_rng_seed(1)
        losses.append(objective.differentiable_loss(game.model, game.guide, game.data))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def test_resting_player_is_bit_equal():
    found = moves(Game(), FlowContrastive(schedule=(2, 1)), 9)
    assert found == [{"energy"}, {"energy"}, {"flow"}] * 3
    assert moves(Game(), FlowContrastive(schedule=None), 3) == [{"energy"}] * 3


def test_simultaneous_moves_both_by_their_own_losses():
    """The energy's gradient is NCE's; the flow's is that of its own turn with the same draws."""
    game = Game()
    both = FlowContrastive(simultaneous=True)
    alone = FlowContrastive(schedule=(1, 0))
    alone.log_normalizers["x"] = nn.Parameter(torch.tensor(1.4))
    both.log_normalizers["x"] = nn.Parameter(torch.tensor(1.4))
    have, want = game.gradients(both), game.gradients(alone)
    torch.testing.assert_close(have["energy"], want["energy"], rtol=0, atol=1e-12)
    assert all(g is None for g in want["flow"])
    assert sum(float(g.abs().sum()) for g in have["flow"]) > 0.1
    assert moves(Game(), FlowContrastive(simultaneous=True), 3) == [{"energy", "flow"}] * 3


def test_simultaneous_flow_gradient():
    alpha = torch.tensor([0.6, 0.3], requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", gaussian(1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(alpha))

    objective = FlowContrastive(simultaneous=True)
    objective.log_normalizers["x"] = nn.Parameter(torch.tensor(HALF_LOG_2PI))
    loss = objective.differentiable_loss(model, guide, Z)
    want = objective.second_player(gaussian(1.0), Z, flow(alpha), HALF_LOG_2PI).sum()
    (have,), (want,) = (torch.autograd.grad(value, alpha) for value in (loss, want))
    torch.testing.assert_close(have, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("turns", [(1, 1), (0, 1)])
def test_log_z_rests_with_the_energy(turns):
    """On the flow's turns c has no gradient, and a closed form does not move it."""
    for c_update in ("gradient", "closed_form"):
        objective = FlowContrastive(schedule=turns, c_update=c_update)
        game, values = Game(), []
        svi = SVI(game.model, game.guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
        for _ in range(5):
            svi.step(game.data)
            values.append(float(objective.log_normalizers["x"].detach()))
        changes = [now != before for before, now in zip(values, values[1:], strict=False)]
        assert changes == ([False, True] * 2 if turns == (1, 1) else [False] * 4)


# --- throttle


@pytest.mark.parametrize(
    ("skill", "turn"), [(0.95, "flow"), (0.3, "energy"), (0.7, None), (float("nan"), None)]
)
def test_throttle_overrules_the_schedule(skill, turn):
    """Above ``high`` it is always the flow's turn, below ``low`` the energy's."""
    for steps, scheduled in ((0, "energy"), (1, "flow")):
        objective = FlowContrastive(schedule=(1, 1), throttle=(0.5, 0.9))
        objective.skill = torch.tensor(skill)
        objective.num_steps_taken += steps
        assert moves(Game(), objective, 1) == [{turn or scheduled}]


def test_skill_is_the_accuracy_of_about_ten_steps():
    """A step weighs a tenth; the first is all there is."""
    game, objective = Game(), FlowContrastive(throttle=(0.0, 1.0))
    moves(game, objective, 1)
    first = float(objective.diagnostics["x"]["accuracy"])
    assert float(objective.skill) == pytest.approx(first, abs=1e-6)
    objective.skill = torch.tensor(0.0)
    moves(game, objective, 1)
    second = float(objective.diagnostics["x"]["accuracy"])
    assert second > 0.3
    assert float(objective.skill) == pytest.approx(0.1 * second, abs=1e-6)


def test_throttle_keeps_the_accuracy_in_its_band():
    """Ten energy steps to a flow step, data narrower than the flow: the energy runs away with the
    game unless the flow may take its turn.
    """
    skills = []
    for throttle in (None, (0.5, 0.65)):
        game = Game()
        game.data = 0.2 * game.data
        objective = FlowContrastive(schedule=(10, 1), throttle=throttle)
        moves(game, objective, 60)
        skills.append(float(objective.skill))
    assert skills[0] > 0.75
    assert skills[1] < 0.7


def test_a_turn_is_decided_once_and_skill_is_saved():
    game = Game()
    objective = FlowContrastive(throttle=(0.0, 0.5), num_particles=3)
    objective.skill = torch.tensor(0.9)
    assert moves(game, objective, 1) == [{"flow"}]
    twin = FlowContrastive(throttle=(0.0, 0.5))
    twin.load_state_dict(objective.state_dict())
    assert twin.skill == objective.skill
    before = objective.skill.clone()
    with torch.no_grad():
        objective.differentiable_loss(game.model, game.guide, game.data)
    assert objective.skill == before


# --- learning


def test_log_z_stays_log_z_while_the_flow_moves():
    """Noise starts off the data and ends near them; c follows the energy's log Z all along."""
    game = Game()
    objective = FlowContrastive(mle_weight=0.2, c_update="closed_form", c_rate=0.2)
    svi = SVI(game.model, game.guide, pyro.optim.Adam({"lr": 0.04}), loss=objective)
    with torch.no_grad():
        start = game.law().log_prob(game.data).mean()
    for _ in range(90):
        svi.step(game.data)
    with torch.no_grad():
        end = game.law().log_prob(game.data).mean()
    assert end - start > 0.3
    c = float(objective.log_normalizer("x").value)
    assert c == pytest.approx(float(game.log_z()), abs=0.25)
    precision = torch.linalg.inv(torch.cov(game.data.T))
    want = torch.stack([precision[0, 0], precision[0, 1], precision[1, 1]])
    assert (game.shape.detach() - want).abs().max() < 0.8


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"throttle": (0.9, 0.5)}, "throttle must be .* low < high"),
        ({"throttle": (0.5, 0.9), "simultaneous": True}, "with simultaneous=True all move"),
        ({"mle_weight": -1.0}, "must not be negative"),
        ({"adversarial_weight": 0.0}, "nor both zero"),
        ({"schedule": (0, 0)}, "schedule must be"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FlowContrastive(**options)


def scored(p, law, x=Z[:5], **options):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law)

    chosen = guide if law is not None else no_guide
    return FlowContrastive(**options).differentiable_loss(model, chosen, x)


@pytest.mark.parametrize("turns", [(1, 0), (0, 1)])
def test_the_guide_must_hold_a_flow(turns):
    based = EnergyDistribution(torch.cos, base=dist.Normal(torch.zeros(()), 1.0))
    with pytest.raises(ValueError, match="the guide must hold it"):
        scored(based, None, schedule=turns)


def test_noise_without_gradients():
    bits = EnergyDistribution(lambda x: x, support=dist.constraints.boolean)
    law = dist.Bernoulli(torch.tensor(0.5))
    with pytest.raises(ValueError, match="Bernoulli cannot draw with gradients.*NCE"):
        scored(bits, law, torch.tensor([0.0, 1.0]), schedule=(0, 1))


def test_conditional_energies():
    context = torch.arange(5.0)
    p = EnergyDistribution(lambda x: 0.5 * x**2 - context * x, event_shape=())
    with pytest.raises(ValueError, match="depends on row-wise values.*RankingNCE"):
        scored(p, dist.Normal(torch.zeros(()), 2.0))


@pytest.mark.filterwarnings("ignore:Encountered (NaN|inf)")
@pytest.mark.parametrize("turns", [(1, 0), (0, 1)])
def test_numbers_that_are_not_finite(turns):
    p = EnergyDistribution(lambda x: (x - 100.0).log(), event_shape=())
    with pytest.raises(NonFiniteEnergyError, match="site 'x'.*not finite in 5 of 5 rows"):
        scored(p, dist.Normal(torch.zeros(()), 2.0), schedule=turns)
    with pytest.raises(ValueError, match="support"):
        scored(gaussian(1.0), dist.Normal(0.0, 1.0), torch.tensor([float("nan")]), schedule=turns)


def test_held_out_losses_do_not_compare():
    assert not FlowContrastive().is_held_out_criterion
    assert NCE().is_held_out_criterion


@pytest.mark.parametrize("interrupted_at", [5, 6])  # before the energy's turn and the flow's
@pytest.mark.parametrize("validate_every", [100, 3])
def test_a_resumed_fit_shows_the_same_diagnostics(interrupted_at, validate_every, tmp_path):
    """Neither the run that finds the parameters nor a validation point is a step of a player."""
    x = torch.randn(24)

    def run(steps, seed, path):
        pyro.clear_param_store()

        def model(x):
            precision = pyro.param("precision", torch.tensor(2.0))
            with pyro.plate("data", len(x)):
                ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
                pyro.sample("x", ebm, obs=x)

        def guide(x):
            loc = pyro.param("loc", torch.tensor(1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, 1.2))

        options = {"guide": guide, "batch_size": 6, "lr": 0.05, "checkpoint": path, "seed": seed}
        options |= {"validation": x[:8], "validate_every": validate_every, "disable_progbar": True}
        return fit(model, x, FlowContrastive(), num_steps=steps, **options)

    whole = run(11, 0, None)
    run(interrupted_at, 0, tmp_path / "fit.pt")
    resumed = run(11, 9, tmp_path / "fit.pt")
    assert whole.losses == resumed.losses
    assert whole.diagnostic_steps == resumed.diagnostic_steps
    assert whole.diagnostics == resumed.diagnostics
    assert whole.diagnostic_steps["x/log_z"] == [1, 3, 5, 7, 9, 11]
    assert whole.diagnostic_steps["x/value"] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("options", [{"schedule": (1, 1)}, {"simultaneous": True}], ids=str)
def test_replayed_steps_are_the_steps_themselves(options):
    """Of both players; the skill is a tensor that every step writes to."""

    def model(x):
        precision = pyro.param("precision", torch.tensor(1.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", gaussian(precision), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.2))

    data, found = torch.randn(40), []
    for capture in (False, True):
        pyro.clear_param_store()
        objective = FlowContrastive(mle_weight=0.2, **options)
        run = {"lr": 0.05, "num_steps": 20, "batch_size": 10, "seed": 0, "disable_progbar": True}
        fit(model, data, objective, guide=guide, capture=capture, **run)
        values = [*pyro.get_param_store().values(), *objective.log_normalizers.values()]
        found.append(torch.stack([*values, objective.skill]).detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)
