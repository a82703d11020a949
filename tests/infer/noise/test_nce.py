"""NCE and ranking NCE against integrals: gradients and minima of the loss in expectation, to
rounding.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import softplus

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import NCE, RankingNCE
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.ops.log_space import bennett, log_mean_exp

NOISE = dist.Normal(torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64))
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def quadratic(theta):
    """E(x) = a x^2 / 2 + b x."""
    return EnergyDistribution(lambda x: 0.5 * theta[0] * x**2 + theta[1] * x, event_shape=())


def log_z(theta):
    return 0.5 * torch.log(2 * math.pi / theta[0]) + 0.5 * theta[1] ** 2 / theta[0]


def expected_loss(nce, p, c, p_data=None):
    """The expected loss, by the trapezoid rule; it is a sum of a term in x and a term in y."""
    p_data = p_data or dist.Normal(torch.tensor(0.0), 1.0)
    grid = torch.linspace(-16.0, 17.0, 3001)
    here = torch.zeros_like(grid)
    width = grid[1] - grid[0]

    def rows(x, y):
        contrast = Contrast(y[None], NOISE.log_prob(y)[None], NOISE.log_prob(x))
        return nce.per_datum(p, x, contrast, c)

    data = (p_data.log_prob(grid).exp() * rows(grid, here)).sum() * width
    noise = (NOISE.log_prob(grid).exp() * rows(here, grid)).sum() * width
    return data + noise - rows(here[:1], here[:1])[0]


def expected_gradient(nce, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(expected_loss(nce, quadratic(theta), theta[2]), theta)[0]


def test_gradient_approaches_the_likelihoods():
    """At c = log Z the gradient tends to the likelihood's, with an error that falls as 1 / nu."""
    theta = torch.tensor([0.8, 0.2])
    point = torch.cat([theta, log_z(theta)[None]])
    mle = torch.tensor([0.5 * (1 - (1.25 + 0.0625)), 0.25])
    printed = {1: (-0.062, 0.115), 10: (-0.136, 0.222), 100: (-0.1539, 0.2469)}
    errors = []
    for nu in (1, 10, 100, 1000, 10_000):
        gradient = expected_gradient(NCE(num_noise=nu), point)[:2]
        if nu in printed:
            torch.testing.assert_close(gradient, torch.tensor(printed[nu]), rtol=0, atol=6e-4)
        errors.append(float((gradient - mle).abs().max()))
    assert errors[-1] < 5e-5
    assert errors[-2] / errors[-1] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("nu", [0.5, 1, 2.5, 10])
def test_truth_is_stationary(nu):
    """Energy and log Z are both identified, for every ratio of noise to data."""
    truth = torch.tensor([1.0, 0.0, HALF_LOG_2PI])
    gradient = expected_gradient(NCE(num_noise=nu), truth)
    torch.testing.assert_close(gradient, torch.zeros(3), rtol=0, atol=1e-9)
    off = expected_gradient(NCE(num_noise=nu), truth + torch.tensor([0.05, 0.0, 0.0]))
    assert off.abs().max() > 1e-3


@pytest.mark.parametrize("bug", ["no weight of the noise", "no noise density"])
def test_stationarity_sees_a_bug(bug, monkeypatch):
    """The same check on a loss with a mistake in it is off by more than a hundred thousand times
    its tolerance.
    """
    truth = torch.tensor([1.0, 0.0, HALF_LOG_2PI])
    nce = NCE(num_noise=4)
    right = NCE.per_datum

    def wrong(p, x, contrast, c):
        if bug == "no noise density":
            flat = contrast._replace(
                log_noise=0 * contrast.log_noise, log_noise_data=0 * contrast.log_noise_data
            )
            return right(nce, p, x, flat, c)
        logits = p.unnormalized_log_prob(torch.stack([x, contrast.points[0]]))
        logits = logits - torch.stack([contrast.log_noise_data, contrast.log_noise[0]])
        data, noise = logits - c - math.log(4)
        return softplus(-data) + softplus(noise)

    monkeypatch.setattr(nce, "per_datum", wrong)
    assert expected_gradient(nce, truth).abs().max() > 1e-2


def test_c_of_a_wrong_model_is_not_its_log_z():
    """Only where the data come from the model does c estimate log Z: that is what the gap is
    reported for.
    """
    theta = torch.tensor([2.0, 0.0])
    low, high = -3.0, 3.0
    nce = NCE(num_noise=1)
    for _ in range(60):
        c = torch.tensor((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(expected_loss(nce, quadratic(theta), c), c)
        low, high = (low, c.item()) if slope > 0 else (c.item(), high)
    assert abs(low - log_z(theta).item()) > 0.05


def test_states_enumerated():
    """Three spins 0/1 and uniform noise: eight states, nothing is approximated."""
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    w = torch.tensor([0.4, -0.7, 0.2, 1.1]).requires_grad_()
    noise = dist.Bernoulli(torch.full((3,), 0.5)).to_event(1)
    p = EnergyDistribution(lambda x: x @ w[:3] + w[3] * x[..., 0] * x[..., 1], base=noise)
    log_p = p.unnormalized_log_prob(states).detach()
    true_c = torch.logsumexp(log_p, 0)
    c = true_c.clone().requires_grad_()
    for nu in (0.5, 3):
        nce = NCE(num_noise=nu)
        contrast = Contrast(
            states[:1].expand(1, 8, 3),
            noise.log_prob(states)[:1].expand(1, 8),
            noise.log_prob(states),
        )
        at_data = nce.per_datum(p, states, contrast, c)
        contrast = Contrast(
            states[None], noise.log_prob(states)[None], noise.log_prob(states)[:1].expand(8)
        )
        at_noise = nce.per_datum(p, states[:1].expand(8, 3), contrast, c)
        loss = ((log_p - true_c).exp() * at_data).sum() + at_noise.mean()
        gradients = torch.autograd.grad(loss, [w, c])
        both = nce.per_datum(
            p, states[:1], Contrast(*(t[:, :1] for t in contrast[:2]), contrast[2][:1]), c
        )
        extra = torch.autograd.grad(both.sum(), [w, c])
        for have, twice in zip(gradients, extra, strict=True):
            torch.testing.assert_close(have, twice, rtol=0, atol=1e-12)


# --- log Z


def sample(num_rows, nu, seed=0):
    pyro.set_rng_seed(seed)
    x = torch.randn(num_rows)
    y = NOISE.sample((math.ceil(nu), num_rows))
    return x, Contrast(y, NOISE.log_prob(y), NOISE.log_prob(x))


def fit_by_newton(nce, x, contrast, steps=4):
    """Returns the minimizer over (a, b, c) and its standard errors (sandwich)."""
    theta = torch.tensor([1.0, 0.0, HALF_LOG_2PI])

    def rows(theta):
        return nce.per_datum(quadratic(theta), x, contrast, theta[2])

    def mean(theta):
        return rows(theta).mean()

    for _ in range(steps):
        at = theta.requires_grad_()
        (gradient,) = torch.autograd.grad(mean(at), at)
        hessian = torch.autograd.functional.hessian(mean, at)
        theta = (at - torch.linalg.solve(hessian, gradient)).detach()
    assert gradient.abs().max() < 1e-9
    scores = torch.autograd.functional.jacobian(lambda t: rows(t).reshape(50, -1).mean(1), theta)
    bread = torch.linalg.inv(torch.autograd.functional.hessian(mean, theta))
    return theta, (bread @ torch.cov(scores.T) @ bread / 50).diagonal().sqrt()


def check_estimates(num_rows, nu):
    theta, stderr = fit_by_newton(NCE(num_noise=nu), *sample(num_rows, nu))
    z = (theta - torch.tensor([1.0, 0.0, HALF_LOG_2PI])) / stderr
    assert z.abs().max() < 5
    return theta, stderr


@pytest.mark.parametrize("nu", [0.5, 1, 10])
def test_estimates_of_a_sample(nu):
    """Within five standard errors, which are small enough to see a shift of 0.1 in c."""
    _, stderr = check_estimates(5_000, nu)
    assert stderr[2] < 0.1 / 5


@pytest.mark.slow
@pytest.mark.parametrize("nu", [0.5, 1, 10])
def test_estimates_of_a_large_sample(nu):
    theta, stderr = check_estimates(200_000, nu)
    assert stderr[2] < 0.005
    assert theta[2] == pytest.approx(HALF_LOG_2PI, abs=0.01)


def test_c_solves_bennetts_equation():
    """At any energy, where the loss is least in c, data and noise are confused equally often."""
    nu = 3
    x, contrast = sample(500, nu)
    theta = torch.tensor([1.4, -0.3])
    p = quadratic(theta)
    points = torch.cat([x[None], contrast.points])
    log_q = torch.cat([contrast.log_noise_data[None], contrast.log_noise])
    ratios = p.unnormalized_log_prob(points) - log_q - math.log(nu)
    root = bennett(ratios[0], ratios[1:].flatten(), ratio=nu).requires_grad_()
    loss = NCE(num_noise=nu).per_datum(p, x, contrast, root).mean()
    (slope,) = torch.autograd.grad(loss, root)
    assert abs(slope) < 1e-14
    confused = torch.sigmoid(root - ratios[0]).mean() - nu * torch.sigmoid(ratios[1:] - root).mean()
    assert abs(confused.detach()) < 1e-14


def test_first_c_is_the_log_mean_weight():
    data = torch.randn(40)
    nce = NCE(num_noise=6, noise=NOISE)
    inner, contrasts = nce.draw, []
    nce.draw = lambda *args: contrasts.append(inner(*args)) or contrasts[-1]

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", quadratic(torch.tensor([2.0, 0.1])), obs=x)

    nce.differentiable_loss(model, lambda x: None, data)
    p = quadratic(torch.tensor([2.0, 0.1]))
    weights = p.unnormalized_log_prob(contrasts[0].points) - contrasts[0].log_noise
    first = nce.log_normalizers["x"].detach()
    torch.testing.assert_close(first, log_mean_exp(weights.flatten()), rtol=0, atol=1e-12)


def test_closed_form_c_averages_the_roots():
    """Each step moves c by ``c_rate`` of the way to its own batch's root; without gradients nothing
    moves.
    """
    x, contrast = sample(300, 2)
    nce = NCE(num_noise=2, c_update="closed_form", c_rate=0.25)
    nce.draw = lambda *args: contrast

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", quadratic(torch.tensor([1.5, 0.0])), obs=x)

    p = quadratic(torch.tensor([1.5, 0.0]))
    points = torch.cat([x[None], contrast.points])
    log_q = torch.cat([contrast.log_noise_data[None], contrast.log_noise])
    ratios = p.unnormalized_log_prob(points) - log_q
    c = log_mean_exp(ratios[1:].flatten())
    with torch.no_grad():
        nce.differentiable_loss(model, lambda x: None, x)
    torch.testing.assert_close(nce.log_normalizers["x"].detach(), c, rtol=0, atol=1e-12)
    ratios = ratios - math.log(2)
    root = bennett(ratios[0], ratios[1:].flatten(), ratio=2)
    for _ in range(3):
        nce.differentiable_loss(model, lambda x: None, x)
        c = c + 0.25 * (root - c)
        torch.testing.assert_close(nce.log_normalizers["x"].detach(), c, rtol=0, atol=1e-12)
    assert not nce.log_normalizers["x"].requires_grad


def trained(objective, rows, steps):
    """Steps at a standard normal law, with noise that is one too."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", quadratic(torch.tensor([1.0, 0.0])), obs=x)

    for _ in range(steps):
        objective.differentiable_loss(model, lambda x: None, torch.randn(rows))


def test_undecided_comparisons_are_counted():
    """Noise that is the model leaves all in doubt: nu / (1 + nu) for each of 16 data."""
    objective = NCE(3, dist.Normal(0.0, 1.0), c_update="closed_form")
    trained(objective, 16, 1)
    undecided = objective.diagnostics["x"]["undecided"]
    torch.testing.assert_close(undecided, torch.tensor(16 * 0.75), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("c_update", "rows", "warns"),
    [
        ("closed_form", 16, True),
        ("closed_form", 32, False),
        ("gradient", 16, False),
    ],
)
def test_a_root_of_few_comparisons_is_said(c_update, rows, warns):
    """Of 16 and 32 data, with one noise draw each, half are undecided: 8 and 16."""
    objective = NCE(1, dist.Normal(0.0, 1.0), c_update=c_update)
    message = "step 128: Bennett's equation of a batch rests on 8.0 comparisons"
    with pytest.warns(SurrogateWarning, match=message) if warns else nullcontext():
        trained(objective, rows, 129)


def test_masked_rows_have_no_say_in_the_closed_form():
    x, contrast = sample(100, 2)
    roots = []
    for padding in (0, 50):
        nce = NCE(num_noise=2, c_update="closed_form", c_rate=1.0)
        rows = torch.cat([torch.arange(100), torch.zeros(padding, dtype=torch.long)])
        nce.draw = lambda *args, rows=rows: Contrast(
            contrast.points[:, rows], contrast.log_noise[:, rows], contrast.log_noise_data[rows]
        )

        def model(x, mask):
            with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
                pyro.sample("x", quadratic(torch.tensor([1.5, 0.0])), obs=x)

        padded = torch.cat([x, torch.full((padding,), 5.0)])
        nce.differentiable_loss(model, lambda *_: None, padded, torch.arange(len(padded)) < 100)
        roots.append(nce.log_normalizers["x"].detach())
    torch.testing.assert_close(roots[0], roots[1], rtol=0, atol=1e-12)


# --- noise


def run(nce, model, data):
    return nce.differentiable_loss(model, lambda *_: None, data)


def test_noise_of_groups_is_regrouped_as_the_energy_is():
    """One wrapper has made both the rows of a group and a row's coordinates event dims."""
    data, noise = torch.randn(4, 5, 2), dist.Normal(torch.arange(2.0), 1.5)
    energy = EnergyDistribution(lambda y: 0.5 * y.square().sum(-1), event_shape=(2,))

    def loss_of(law):
        def model(x):
            with pyro.plate("groups", len(x)):
                pyro.sample("x", energy.expand([len(x), 5]).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("groups", len(x)):
                pyro.sample("x", law)

        pyro.set_rng_seed(0)
        return NCE(3).differentiable_loss(model, guide, data)

    at_once = loss_of(noise.expand([4, 5, 2]).to_event(2))
    in_turns = loss_of(noise.to_event(1).expand([4, 5]).to_event(1))
    torch.testing.assert_close(at_once, in_turns, rtol=0, atol=1e-10)


def vectors(x):
    with pyro.plate("data", len(x)):
        pyro.sample(
            "x", EnergyDistribution(lambda y: 0.5 * y.square().sum(-1), event_shape=(2,)), obs=x
        )


def test_fitted_noise_has_the_datas_moments():
    data = torch.randn(500, 2) @ torch.tensor([[1.0, 0.5], [0.0, 2.0]]) + 3.0
    nce = NCE(num_noise=1, noise="gaussian")
    run(nce, vectors, data)
    torch.testing.assert_close(nce.noise_of("x").loc, data.mean(0))
    torch.testing.assert_close(nce.noise_of("x").covariance_matrix, torch.cov(data.T))
    first = nce.fitted["x"]
    run(nce, vectors, data[:10])
    assert nce.fitted["x"] is first


def test_masked_rows_have_no_say_in_fitted_noise():
    data = torch.randn(30, 2)
    mask = torch.arange(30) % 3 != 0
    padded = torch.where(mask[:, None], data, 1e3)
    nce = NCE(num_noise=1, noise="gaussian")
    run(nce, pyro.poutine.mask(vectors, mask=mask), padded)
    noise = nce.noise_of("x")
    torch.testing.assert_close(noise.loc, data[mask].mean(0), rtol=0, atol=1e-12)
    cov = torch.cov(data[mask].T)
    torch.testing.assert_close(noise.covariance_matrix, cov, rtol=0, atol=1e-12)


def test_noise_is_not_trained():
    """Training the noise here would make it flee from the data, or chase them."""
    scale = torch.tensor(1.5).requires_grad_()
    w = torch.tensor(1.0).requires_grad_()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda y: 0.5 * w * y**2, event_shape=()), obs=x)

    for make in (NCE, RankingNCE):
        loss = run(make(num_noise=3, noise=dist.Normal(0.0, scale)), model, torch.randn(20))
        got = torch.autograd.grad(loss, [w, scale], allow_unused=True)
        assert got[0] is not None
        assert got[1] is None


def test_learnable_base_is_trained_as_part_of_the_model():
    """With noise = base the densities cancel in value; the base's own gradient does not."""
    scale = torch.tensor(1.5).requires_grad_()

    def model(x):
        base = dist.Normal(torch.tensor(0.0), scale)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda y: 0.1 * y, base=base), obs=x)

    nce = NCE(num_noise=3)
    x = torch.randn(50)
    contrasts = []
    inner = nce.draw
    nce.draw = lambda *args: contrasts.append(inner(*args)) or contrasts[-1]
    (got,) = torch.autograd.grad(run(nce, model, x), scale)
    c = nce.log_normalizers["x"].detach()
    points = torch.cat([x[None], contrasts[0].points])
    fixed = dist.Normal(0.0, 1.5).log_prob(points)
    logits = -0.1 * points + dist.Normal(0.0, scale).log_prob(points) - fixed - c - math.log(3)
    loss = (softplus(-logits[0]) + softplus(logits[1:]).sum(0)).sum()
    torch.testing.assert_close(got, torch.autograd.grad(loss, scale)[0], rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*noise does not cover the data")
@pytest.mark.parametrize("far", [0.0, 30.0])
def test_diagnostics(far):
    """Useless noise is told from data without error; good noise half of the time."""
    nce = NCE(num_noise=2, noise=dist.Normal(far, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda y: 0.5 * y**2, event_shape=()), obs=x)

    run(nce, model, torch.randn(4000))
    found = {name: float(value) for name, value in nce.diagnostics["x"].items()}
    assert set(found) == {"accuracy", "noise_ess", "log_z", "log_z_gap"}
    assert found["log_z_gap"] == pytest.approx(0.0, abs=1e-10)
    if far:
        assert found["noise_ess"] < 0.01
    else:
        assert found["accuracy"] == pytest.approx(2 / 3)  # guess "noise" always
        assert found["noise_ess"] == pytest.approx(1.0)
        assert found["log_z"] == pytest.approx(HALF_LOG_2PI)


def test_log_z_gap_is_positive_where_log_z_is_too_large():
    """Under noise from the model itself every weight is Z."""
    nce = NCE(num_noise=2, noise=dist.Normal(0.0, 1.0))
    for excess in (0.7, -0.4):
        known = torch.tensor(HALF_LOG_2PI + excess)

        def model(x, known=known):
            ebm = EnergyDistribution(
                lambda y: 0.5 * y**2, event_shape=(), log_normalizer=lambda: known
            )
            with pyro.plate("data", len(x)):
                pyro.sample("x", ebm, obs=x)

        run(nce, model, torch.randn(10))
        assert float(nce.diagnostics["x"]["log_z_gap"]) == pytest.approx(excess, abs=1e-12)


@pytest.mark.parametrize(("nu", "draws"), [(1, 1), (2, 2), (2.5, 3), (2.01, 3)])
def test_a_fraction_of_a_draw_is_a_draw_more(nu, draws):
    contrast = NCE(num_noise=nu, noise=NOISE).draw(quadratic(torch.ones(2)), torch.zeros(5), None)
    assert contrast.points.shape == contrast.log_noise.shape == (draws, 5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NCE(num_noise=0), "num_noise must be positive, got 0"),
        (
            lambda: RankingNCE(num_noise=-1),
            "num_noise must be a whole number of at least 1, got -1",
        ),
        (lambda: NCE(noise="flow"), "noise must be a distribution, 'gaussian' or None"),
        (lambda: NCE(c_update="newton"), "c_update must be one of gradient, closed_form"),
        (lambda: NCE(schedule=(1, 1)), "no second player"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_gaussian_noise_needs_vectors_and_enough_rows():
    def matrices(x):
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda y: (y**2).sum((-2, -1)), event_shape=(2, 2))
            pyro.sample("x", law, obs=x)

    with pytest.raises(ValueError, match=r"fits numbers and vectors .* got 2"):
        run(NCE(noise="gaussian"), matrices, torch.randn(10, 2, 2))
    with pytest.raises(ValueError, match="more rows than dimensions"):
        run(NCE(noise="gaussian"), vectors, torch.randn(2, 2))


# --- ranking


def ranking_gradient(theta, num_points=301, *, objective=None):
    """The expected gradient for one noise draw, over a grid of (x, y)."""
    objective = objective or RankingNCE(num_noise=1)
    theta = theta.clone().requires_grad_()
    grid = torch.linspace(-9.0, 10.0, num_points)
    width = grid[1] - grid[0]
    x, y = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
    contrast = Contrast(y[None], NOISE.log_prob(y)[None], NOISE.log_prob(x))
    rows = objective.per_datum(quadratic(theta), x, contrast, torch.zeros(()))
    weights = (dist.Normal(0.0, 1.0).log_prob(x) + NOISE.log_prob(y)).exp() * width**2
    value = (weights * rows).sum()
    return value, torch.autograd.grad(value, theta)[0]


def test_ranking_is_consistent_with_one_draw():
    truth = torch.tensor([1.0, 0.0])
    _, gradient = ranking_gradient(truth)
    torch.testing.assert_close(gradient, torch.zeros(2), rtol=0, atol=1e-7)
    assert ranking_gradient(truth + torch.tensor([0.05, 0.0]))[1].abs().max() > 1e-3


def test_ranking_sees_a_missing_noise_density():
    class Wrong(RankingNCE):
        def per_datum(self, p, x, contrast, log_z):
            return super().per_datum(
                p,
                x,
                Contrast(contrast.points, 0 * contrast.log_noise, 0 * contrast.log_noise_data),
                log_z,
            )

    _, gradient = ranking_gradient(torch.tensor([1.0, 0.0]), objective=Wrong(num_noise=1))
    assert gradient.abs().max() > 1e-2


def test_ranking_bounds_a_divergence():
    """log 2 - L is at most the divergence of data from noise, for the best energy too."""
    value, _ = ranking_gradient(torch.tensor([1.0, 0.0]))
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.5, 1.5)
    )
    assert 0 < math.log(2) - value.item() < kl.item()


def test_ranking_does_not_see_a_constant():
    x, contrast = sample(50, 4)
    p = quadratic(torch.tensor([1.3, 0.2]))
    shifted = p.tilt(lambda x: torch.full_like(x, 5.0))
    ranking = RankingNCE(num_noise=4)
    have = ranking.per_datum(shifted, x, contrast, torch.tensor(3.0))
    torch.testing.assert_close(have, ranking.per_datum(p, x, contrast, torch.zeros(())))


@pytest.mark.parametrize("make", [NCE, RankingNCE])
def test_data_without_noise_are_refused(make):
    """Told from noise by an infinite log ratio, they would be left out of the loss in silence."""

    def model(x, mask=None):
        law = EnergyDistribution(
            lambda x: 0.5 * x, event_shape=(), support=dist.constraints.unit_interval
        )
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=True if mask is None else mask):
            pyro.sample("x", law, obs=x)

    def no_guide(*args):
        return None

    x = torch.cat([torch.rand(18), torch.ones(2)])
    uniform, message = dist.Uniform(0.0, 1.0), "noise is -inf in 2 of 20 rows of the data"
    objective = make(3, uniform)
    assert objective.differentiable_loss(model, no_guide, x[:18]).isfinite()
    with pytest.raises(ValueError, match=message):  # at every step
        objective.differentiable_loss(model, no_guide, x)
    with pytest.raises(ValueError, match=message):
        make(3, uniform).freeze(model, x)
    assert objective.differentiable_loss(model, no_guide, x, torch.arange(20) < 18).isfinite()
    both_ends = make(3, dist.Beta(1.0, 1.0))
    assert both_ends.differentiable_loss(model, no_guide, x.index_fill(0, x.argmin(), 0)).isfinite()


def test_a_distribution_in_the_place_of_a_number():
    with pytest.raises(TypeError, match="drawn from is noise=; got num_noise=Normal"):
        NCE(dist.Normal(0.0, 1.0))
