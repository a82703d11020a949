"""One loss in many guises: score objectives, recovery likelihood and probability flow.

With draws tied to rows, the loss and its gradient on the full data equal the formula written out
row by row, the mean over all subsamples, the padded and masked data, nested plates, two sites, a
torch module, a frozen target, and its batch of chains.
"""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from one_site import rows_in
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.nn import Linear, ReLU, Sequential

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.energies import Ising
from pyro_ebm.infer.discrete.minimum_probability_flow import MinimumProbabilityFlow
from pyro_ebm.infer.score.denoising import DenoisingScoreMatching
from pyro_ebm.infer.score.recovery_likelihood import RecoveryLikelihood
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.infer.score.sliced import SlicedScoreMatching
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.ops.constraints import spins
from pyro_ebm.poutine import surrogate

pytestmark = pytest.mark.filterwarnings("ignore:DenoisingScoreMatching.conditioning='scale'")

NUM_ROWS = 5
LEVELS = (0.2, 0.9)
MAKERS = {
    "hutchinson": lambda: ScoreMatching(trace="hutchinson", num_probes=2),
    "sliced": lambda: SlicedScoreMatching(2, directions="gaussian"),
    "sliced, plain": lambda: SlicedScoreMatching(2, variance_reduced=False, directions="sphere"),
    "denoising": lambda: DenoisingScoreMatching(0.4, num_noise=2),
    "denoising, control": lambda: DenoisingScoreMatching(0.4, num_noise=2, control_variate=True),
    "levels, argument": lambda: DenoisingScoreMatching(LEVELS, 2, conditioning="argument"),
    "levels, scale": lambda: DenoisingScoreMatching(
        LEVELS, 2, conditioning="scale", control_variate=True
    ),
    "recovery": lambda: RecoveryLikelihood(0.5, num_steps=2, num_negatives=2),
    "flow": MinimumProbabilityFlow,
}
CONTINUOUS = [name for name in MAKERS if name != "flow"]
DRAWN_ONCE = [name for name in CONTINUOUS if name != "recovery"]


def no_guide(*args):
    return None


def energy_of(theta, x, noise_std=0.7):
    level = torch.as_tensor(noise_std)
    return theta[0] * torch.cos(x).sum(-1) * (1 + level) + theta[1] * x.prod(-1)


class Setup:
    """An energy with two parameters, an objective with draws tied to rows, its loss on all rows."""

    def __init__(self, name):
        self.name, self.objective = name, MAKERS[name]()
        self.theta = torch.tensor([0.4, -0.3], requires_grad=True)
        x = torch.randn(NUM_ROWS, 2)
        self.data = x if name in CONTINUOUS else torch.cat([x, x], -1).sign()
        self.whole = self.tie()
        self.loss, self.grads = self.valued(self.by_hand())

    def tie(self):
        with torch.no_grad():
            whole = self.objective.draw(self.law().expand([NUM_ROWS]), self.data, None)

        def draw(p, x, noise):
            if whole is None:
                return None
            rows = rows_in(x, self.data)
            return type(whole)(*(t if t is None else t[:, rows] for t in whole))

        self.objective.draw = draw
        return whole

    def law(self, theta=None):
        theta = self.theta if theta is None else theta
        if self.name in CONTINUOUS:
            base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
            return EnergyDistribution(lambda x, **k: energy_of(theta, x, **k), base=base)
        return EnergyDistribution(lambda x: energy_of(theta, x), event_shape=(4,), support=spins)

    def by_hand(self):
        return sum(self.row(i) for i in range(NUM_ROWS))

    def row(self, i):
        """One row's loss, one draw at a time, derivatives by autograd's own Hessian."""
        x = self.data[i]
        if self.name == "flow":
            flips = [x * (1 - 2 * torch.eye(4)[j]) for j in range(4)]
            u = self.law().energy
            return sum((0.5 * (u(x) - u(y))).exp() for y in flips)
        if self.name == "recovery":
            u = self.law().potential
            return u(x) - 0.5 * sum(u(y) for y in self.whole.points[:, i])
        if self.name.startswith(("denoising", "levels")):
            draws = zip(self.whole.z[:, i], self.whole.noise_std[:, i], strict=True)
            return 0.5 * sum(self.denoising(x, z, level) for z, level in draws)
        s = -self.slope(x)
        hessian = self.hessian(x)
        total = 0.0
        for v in self.whole.directions[:, i]:
            square = (v @ s) ** 2 if "plain" in self.name else s @ s
            total = total + 0.5 * (0.5 * square - v @ hessian @ v)
        return total

    def denoising(self, x, z, level):
        given = {"noise_std": level} if "argument" in self.name else {}
        over = level if "scale" in self.name else 1.0
        near = -self.slope(x + level * z, **given) / over
        loss = 0.5 * ((z / level + near) ** 2).sum()
        if "control" in self.name or "scale" in self.name:
            here = -self.slope(x, **given) / over
            loss = loss - 0.5 * (z @ z - 2) / level**2 - z @ here / level
        return level**2 * loss if "levels" in self.name else loss

    def potential(self, x, **given):
        base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        return energy_of(self.theta, x, **given) - base.log_prob(x)

    def slope(self, x, **given):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.potential(x, **given), x, create_graph=True)[0]

    def hessian(self, x):
        return torch.autograd.functional.hessian(self.potential, x, create_graph=True)

    def full(self, x):
        theta = pyro.param("theta", lambda: self.theta)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.law(theta), obs=x)

    def plain(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.law(), obs=x)

    def valued(self, loss):
        return loss.item(), torch.autograd.grad(loss, self.theta)[0]

    def check(self, model, *args, times=1.0):
        loss = self.objective.differentiable_loss(model, no_guide, *(args or (self.data,)))
        self.compare(self.valued(loss), times)

    def compare(self, got, times=1.0):
        assert got[0] == pytest.approx(times * self.loss, abs=1e-10)
        torch.testing.assert_close(got[1], times * self.grads, rtol=0, atol=1e-10)


@pytest.fixture(params=MAKERS)
def setup(request):
    return Setup(request.param)


def test_full_batch_is_the_formula_by_hand(setup):
    setup.check(setup.plain)


def test_nested_plates_and_to_event(setup):
    def nested(x):
        with pyro.plate("outer", NUM_ROWS, dim=-2), pyro.plate("inner", 1, dim=-1):
            pyro.sample("x", setup.law(), obs=x)

    def event(x):
        pyro.sample("x", setup.law().expand([len(x)]).to_event(1), obs=x)

    setup.check(nested, setup.data.unsqueeze(1))
    setup.check(event)


@pytest.mark.parametrize("padding", [float("nan"), 7.0])
def test_masked_padding(setup, padding):
    order = torch.randperm(8)
    width = setup.data.shape[-1]
    x = torch.cat([setup.data, torch.full((8 - NUM_ROWS, width), padding)])[order]

    def model(x):
        with pyro.plate("data", 8), poutine.mask(mask=order < NUM_ROWS):
            pyro.sample("x", setup.law(), obs=x)

    setup.check(model, x)


def test_scale(setup):
    setup.check(poutine.scale(setup.plain, scale=0.5), times=0.5)


@pytest.mark.parametrize("size", [1, 3])
def test_mean_over_all_subsamples(setup, size):
    """A batch of one is a batch."""

    def model(x, rows):
        with pyro.plate("data", NUM_ROWS, subsample=rows):
            pyro.sample("x", setup.law(), obs=x[rows])

    got = []
    for rows in itertools.combinations(range(NUM_ROWS), size):
        rows = torch.tensor(rows)
        loss = setup.objective.differentiable_loss(model, no_guide, setup.data, rows)
        got.append(setup.valued(loss))
    mean = sum(loss for loss, _ in got) / len(got)
    setup.compare((mean, torch.stack([grad for _, grad in got]).mean(0)))


def test_two_sites(setup):
    def model(x):
        for site, part in {"left": x[:2], "right": x[2:]}.items():
            with pyro.plate(f"rows of {site}", len(part)):
                pyro.sample(site, setup.law(), obs=part)

    setup.check(model)


@pytest.mark.parametrize("vectorized", [False, True])
def test_particles(setup, vectorized):
    setup.objective.num_particles = 2
    setup.objective.vectorize_particles = vectorized
    setup.objective.max_plate_nesting = 2 if vectorized else float("inf")
    setup.check(setup.plain)


def test_bare_handler_module_and_svi(setup):
    scored = surrogate(setup.plain, {"x": setup.objective})
    inside = Trace_ELBO().differentiable_loss(scored, no_guide, setup.data)
    setup.compare(setup.valued(inside))
    loss = setup.objective(setup.full, no_guide)(setup.data)
    assert loss.item() == pytest.approx(setup.loss, abs=1e-10)
    svi = SVI(setup.full, no_guide, pyro.optim.Adam({"lr": 0.01}), loss=setup.objective)
    assert svi.step(setup.data) == pytest.approx(setup.loss, abs=1e-10)


def test_held_out_values_mean_something_but_for_recovery(setup):
    assert setup.objective.is_held_out_criterion is (setup.name != "recovery")


# --- MCMC


def bayesian(setup):
    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", setup.law(theta), obs=x)

    return model


@pytest.mark.parametrize("name", DRAWN_ONCE)
def test_frozen_draws_are_a_fixed_target(name):
    """The same value at the same parameters, that of the formula with the stored draws."""
    setup = Setup(name)
    frozen = setup.objective.freeze(bayesian(setup), setup.data)
    theta = setup.theta.detach()
    target = poutine.condition(surrogate(bayesian(setup), frozen), {"theta": theta})
    found = poutine.trace(target).get_trace(setup.data).log_prob_sum()
    prior = dist.Normal(0.0, 1.0).log_prob(theta).sum()
    torch.testing.assert_close(found, prior - setup.loss, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["sliced", "levels, argument", "levels, scale"])
def test_frozen_objectives_serve_our_mcmc(name):
    """Warnings are errors: the chains run in one batch, as a graph."""
    setup = Setup(name)
    frozen = setup.objective.freeze(bayesian(setup), setup.data)
    kernel = HMC(
        surrogate(bayesian(setup), frozen),
        step_size=0.05,
        trajectory_length=0.1,
        adapt_step_size=False,
    )
    mcmc = MCMC(kernel, 2, 0, num_chains=3, disable_progbar=True)
    mcmc.run(setup.data, initial_params={"theta": torch.zeros(3, 2)})
    assert mcmc.target.is_vectorized
    assert mcmc.get_samples()["theta"].isfinite().all()


@pytest.mark.parametrize("name", DRAWN_ONCE)
def test_fresh_draws_are_no_target(name):
    setup = Setup(name)
    trace = poutine.trace(surrogate(bayesian(setup), setup.objective)).get_trace(setup.data)
    with pytest.raises(RuntimeError, match="freeze it first"):
        trace.log_prob_sum()


def test_what_draws_nothing_freezes_to_itself_and_recovery_not_at_all():
    setup = Setup("flow")
    assert setup.objective.freeze(bayesian(setup), setup.data) is setup.objective
    exact = ScoreMatching()
    assert exact.freeze(bayesian(setup), setup.data) is exact
    with pytest.raises(NotImplementedError, match="RecoveryLikelihood .*EnergyDiscrepancy"):
        RecoveryLikelihood(0.5).freeze(bayesian(setup), setup.data)


# --- conditional energies


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_regression_is_learned_from_its_rows(name):
    """U = (x - w c)^2 (1 + c^2) / 2: every row has a log Z of its own. The gradient in w at the
    least squares solution, taken over many draws, is zero; half a unit off it is not.
    """
    pyro.set_rng_seed(3)
    context = torch.linspace(-1.0, 1.0, 4000)
    weight = 1 + context**2
    x = 0.7 * context + torch.randn(4000) / weight.sqrt()
    objective = MAKERS[name]()

    def law(w):
        def energy(x, noise_std=None):
            variance = 1 / weight
            if noise_std is not None:
                variance = variance + noise_std**2
            return 0.5 * (x - w * context) ** 2 / variance

        return EnergyDistribution(energy, event_shape=(), batch_shape=(4000,))

    rows = {}
    for w in (0.7, 1.2):
        at = torch.full((4000,), w, requires_grad=True)
        with torch.no_grad():
            contrast = objective.draw(law(at), x, None)
        loss = objective.per_datum(law(at), x, contrast, torch.zeros(()))
        (slopes,) = torch.autograd.grad(loss.sum(), at)
        rows[w] = slopes.mean() / (slopes.std() / 4000**0.5)
    assert rows[0.7].abs() < 4
    assert rows[1.2].abs() > 8


# --- what is refused, and what is said


@pytest.mark.parametrize("name", ["hutchinson", "sliced", "recovery"])
@pytest.mark.parametrize("halves", [False, True])
def test_whole_numbers_have_no_slope_between_them(name, halves, recwarn):
    """Counts and grey levels given as floats; one number that is not whole tells measurements.

    Recovery likelihood takes slopes at noisy copies.
    """

    def model(x):
        theta = pyro.param("theta", torch.ones(2))
        with pyro.plate("rows", len(x)):
            law = EnergyDistribution(lambda y: (theta * y**2).sum(-1), event_shape=(2,))
            pyro.sample("x", law, obs=x)

    x = torch.randint(0, 9, (20, 2)).double()
    x[-1, -1] += 0.5 * halves
    MAKERS[name]().differentiable_loss(model, no_guide, x)
    told = [str(w.message) for w in recwarn if "whole numbers" in str(w.message)]
    assert len(told) == (not halves and name != "recovery")


@pytest.mark.parametrize("name", CONTINUOUS)
def test_integers_and_discrete_supports_are_refused(name):
    objective, who = MAKERS[name](), type(MAKERS[name]()).__name__
    law = EnergyDistribution(lambda x, **k: (x**2).sum(-1), event_shape=(2,))
    with pytest.raises(ValueError, match=f"{who} .*floating point.*int64.*PseudoLikelihood"):
        objective.draw(law, torch.ones(3, 2, dtype=torch.int64), None)
    with pytest.raises(NotImplementedError, match=f"{who} .*continuous.*PseudoLikelihood"):
        objective.draw(EnergyDistribution(Ising(0.1, (3, 3))), torch.ones(2, 3, 3), None)


def relu_law():
    net = Sequential(Linear(2, 8), ReLU(), Linear(8, 1)).requires_grad_(requires_grad=False)
    return EnergyDistribution(lambda x, **k: net(x).squeeze(-1), event_shape=(2,))


@pytest.mark.parametrize("name", DRAWN_ONCE)
def test_a_network_of_relus_is_named(name):
    """While training, and when a target of MCMC is made of it."""
    law, who = relu_law(), type(MAKERS[name]()).__name__

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    message = rf"site 'x': the energy's slope jumps .* ReLU network.*{who}"
    with pytest.raises(ValueError, match=message):
        MAKERS[name]().differentiable_loss(model, no_guide, torch.randn(20, 2))
    with pytest.raises(ValueError, match=message):
        MAKERS[name]().freeze(model, torch.randn(20, 2))


def test_recovery_takes_relus():
    law = relu_law()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    loss = MAKERS["recovery"]().differentiable_loss(model, no_guide, torch.randn(20, 2))
    assert loss.isfinite()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_contrast_of_the_guide_is_refused(name):
    setup = Setup(name)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"take the site out of the guide"):
        MAKERS[name]().differentiable_loss(setup.plain, guide, setup.data)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_implicit_models_are_refused(name):
    prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    law = GeneralizedEBM(lambda z: z, prior, lambda x: x.sum(-1))
    with pytest.raises(NotImplementedError, match="got"):
        MAKERS[name]().draw(law, torch.zeros(3), None)


@pytest.mark.parametrize("name", MAKERS)
def test_single_precision_stays_single(name):
    objective, dtype = MAKERS[name](), torch.float32
    theta = torch.tensor([0.4, -0.3], dtype=dtype)
    if name == "flow":
        law = EnergyDistribution(
            lambda x: energy_of(theta, x, theta[0]), event_shape=(2,), support=spins
        )
    else:
        law = EnergyDistribution(
            lambda x, noise_std=theta[0]: energy_of(theta, x, noise_std), event_shape=(2,)
        )
    x = torch.ones(3, 2, dtype=dtype)
    contrast = objective.draw(law, x, None)
    assert objective.per_datum(law, x, contrast, torch.zeros(())).dtype == dtype


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreMatching(trace="sketch"), "trace must be"),
        (lambda: ScoreMatching(trace="hutchinson", num_probes=0), "num_probes must be"),
        (lambda: SlicedScoreMatching(1.5), "num_projections must be"),
        (lambda: SlicedScoreMatching(directions="axes"), "directions must be"),
        (lambda: DenoisingScoreMatching(0.0), "noise_std must be"),
        (lambda: DenoisingScoreMatching([0.1, float("inf")]), "noise_std must be"),
        (lambda: DenoisingScoreMatching(0.1, 0), "num_noise must be"),
        (lambda: DenoisingScoreMatching(0.1, conditioning="maybe"), "conditioning must be"),
        (lambda: DenoisingScoreMatching(0.1, weighting="maybe"), "weighting must be"),
        (lambda: DenoisingScoreMatching([0.1, 1.0]), "2 noise levels have a law each"),
        (lambda: RecoveryLikelihood(-1.0), "noise_std must be"),
        (lambda: RecoveryLikelihood(1.0, num_steps=0), "num_steps must be"),
        (lambda: RecoveryLikelihood(1.0, num_negatives=0), "num_negatives must be"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
