"""Frozen objectives: a fixed function of the parameters, its posterior close to the exact one."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm import LogNormalizer
from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import MissingNormalizerError
from pyro_ebm.infer import KALE, NCE, DonskerVaradhan, EnergyDiscrepancy, RankingNCE
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.poutine import surrogate

NOISE = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.5)
OBJECTIVES = {
    "nce": lambda: NCE(num_noise=3),
    "ranking": lambda: RankingNCE(num_noise=3),
    "ed": lambda: EnergyDiscrepancy(time=(0.2, 2.0)),
    "kale": lambda: KALE(gradient_penalty=0.5),
    "dv": lambda: DonskerVaradhan(gradient_penalty=0.5),
}
WITH_LOG_Z = {"nce", "kale"}


def quadratic(a):
    return EnergyDistribution(lambda x: 0.5 * a * x**2 - 0.5 * (x / 1.5) ** 2, base=NOISE)


def model(x):
    a = pyro.sample("a", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", quadratic(a), obs=x)


def density(frozen, x, a=1.3, model=model):
    values = {"a": torch.tensor(a), "x_log_normalizer": torch.tensor(0.2)}
    return poutine.trace(poutine.condition(surrogate(model, frozen), values)).get_trace(x)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_target_is_fixed(name):
    """The same value at every call, and that of the loss with the stored contrast."""
    x, objective = torch.randn(12), OBJECTIVES[name]()
    frozen = objective.freeze(model, x)
    pyro.set_rng_seed(0)
    state = pyro.util.get_rng_state()["torch"]
    values = []
    for _ in range(3):
        trace = density(frozen, x)
        trace.compute_log_prob()
        values.append(trace.nodes["x"]["log_prob"])
    assert torch.equal(state, pyro.util.get_rng_state()["torch"])
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    p = quadratic(torch.tensor(1.3)).expand([12])
    loss = objective.per_datum(p, x, frozen.contrasts["x"], torch.tensor(0.2))
    torch.testing.assert_close(values[0], -loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_and_captured_graphs(name):
    """vmap over parameters and a captured graph give what one evaluation at a time gives."""
    x = torch.randn(12)
    mask = torch.arange(12) < 9
    frozen = OBJECTIVES[name]().freeze(model, x)

    def masked(x):
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", quadratic(a), obs=x)

    def potential(theta):
        values = {"a": theta[0], "x_log_normalizer": theta[1]}
        target = poutine.condition(surrogate(masked, frozen), values)
        return poutine.trace(target).get_trace(x).log_prob_sum()

    points = torch.tensor([[0.5, 0.1], [1.3, 0.2], [2.0, -0.3]])
    one = [torch.func.grad_and_value(potential)(theta) for theta in points]
    batch = torch.func.vmap(torch.func.grad_and_value(potential))
    with pyro.validation_enabled(False):
        captured = make_fx(lambda theta: batch(theta))(points[[2, 0, 1]])
        many = [batch(points), captured(points)]
    for grads, values in many:
        torch.testing.assert_close(grads, torch.stack([g for g, _ in one]), rtol=0, atol=1e-10)
        torch.testing.assert_close(values, torch.stack([v for _, v in one]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_log_z_is_a_latent_where_it_is_needed(name):
    """In the precision of the energy, whatever the default is."""
    x, objective = torch.randn(12), OBJECTIVES[name]()
    torch.set_default_dtype(torch.float32)
    frozen = objective.freeze(model, x)
    trace = poutine.trace(surrogate(model, frozen)).get_trace(x)
    assert ("x_log_normalizer" in trace.nodes) == (name in WITH_LOG_Z)
    if name in WITH_LOG_Z:
        site = trace.nodes["x_log_normalizer"]
        assert site["fn"].log_prob(torch.tensor(1e6)) == 0.0
        assert site["value"].dtype == x.dtype
        assert not site["cond_indep_stack"]


@pytest.mark.parametrize("name", sorted(WITH_LOG_Z))
@pytest.mark.parametrize("drawn", [1e-6, 1e6])
def test_the_density_does_not_know_the_draw_that_it_was_frozen_at(name, drawn):
    """Not even where an importance sampling estimate of log Z at it would be thousands off."""

    def shifted(x):
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        law = EnergyDistribution(lambda x: 0.5 * a * (x - 30.0) ** 2, base=NOISE)
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    x, densities = torch.randn(12), []
    for value in (1.3, drawn):
        pyro.set_rng_seed(3)  # the same contrast
        frozen = OBJECTIVES[name]().freeze(
            poutine.condition(shifted, {"a": torch.tensor(value)}), x
        )
        densities.append(density(frozen, x, model=shifted).log_prob_sum())
    assert densities[0] == densities[1]


@pytest.mark.parametrize("name", sorted(WITH_LOG_Z))
def test_a_constant_of_the_energy_moves_log_z_and_nothing_else(name):
    """The density of (a, c) is that of (a, c - k(a)) with an energy that is larger by k(a)."""

    def raised(x):
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        law = quadratic(a)
        more = EnergyDistribution(lambda x: law.energy(x) + 700.0 * a, base=NOISE)
        with pyro.plate("data", len(x)):
            pyro.sample("x", more, obs=x)

    x = torch.randn(12)
    frozen = OBJECTIVES[name]().freeze(model, x)
    for a in (0.4, 1.3):
        plain = density(frozen, x, a).log_prob_sum()
        values = {"a": torch.tensor(a), "x_log_normalizer": torch.tensor(0.2 - 700.0 * a)}
        moved = poutine.condition(surrogate(raised, frozen), values)
        moved = poutine.trace(moved).get_trace(x).log_prob_sum()
        torch.testing.assert_close(moved, plain, rtol=0, atol=1e-9)


def with_log_z(make):
    def model(x):
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        ebm = EnergyDistribution(lambda x: 0.5 * a * x**2, event_shape=(), log_normalizer=make(a))
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    return model


def exact_log_z(a):
    return 0.5 * torch.log(2 * math.pi / a)


def stale():
    weight = torch.ones(1)
    z = LogNormalizer(torch.tensor(0.9), parameters=(weight,))
    weight.add_(1.0)
    return z


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda a: lambda: exact_log_z(a), True),
        (exact_log_z, True),
        (lambda a: 0.9, False),
        (lambda a: torch.tensor(0.9), False),
        (lambda a: LogNormalizer(torch.tensor(0.9)), False),
        (lambda a: stale(), False),
        (lambda a: None, False),
    ],
    ids=["function", "graph", "number", "tensor", "estimate", "stale", "none"],
)
def test_only_a_log_z_of_all_parameters_is_known(make, known):
    x, frozen_model = torch.randn(12), with_log_z(make)
    nce = NCE(num_noise=3, noise=NOISE)
    frozen = nce.freeze(frozen_model, x)
    trace = density(frozen, x, model=frozen_model)
    assert ("x_log_normalizer" not in trace.nodes) == known
    trace.compute_log_prob()
    c = exact_log_z(torch.tensor(1.3)) if known else torch.tensor(0.2)
    p = EnergyDistribution(lambda x: 0.65 * x**2, event_shape=())
    want = -nce.per_datum(p, x, frozen.contrasts["x"], c)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], want, rtol=0, atol=1e-12)


def moments(log_density, grid):
    weights = torch.softmax(log_density.flatten(), 0).reshape(log_density.shape)
    marginal = weights.reshape(len(grid), -1).sum(1)
    mean = (marginal * grid).sum()
    return mean.item(), ((marginal * (grid - mean) ** 2).sum() ** 0.5).item()


def posterior_moments(num_noise, x):
    """Mean and sd of the precision, over a grid, under the frozen surrogate with log Z integrated
    out.
    """
    frozen = NCE(num_noise=num_noise, noise=NOISE).freeze(with_log_z(lambda a: None), x)
    a = torch.linspace(0.5, 2.0, 40)
    c = torch.linspace(0.4, 1.4, 40)

    def log_density(a, c):
        p = EnergyDistribution(lambda x: 0.5 * a * x**2, event_shape=())
        prior = frozen.free_log_normalizers()["x"].log_prob(c) + dist.Gamma(2.0, 2.0).log_prob(a)
        return frozen.site_log_prob("x", p, x, log_z=c).sum() + prior

    over_c = torch.func.vmap(log_density, in_dims=(None, 0))
    return moments(torch.stack([over_c(value, c) for value in a]), a)


def test_posterior_tends_to_the_exact_one():
    """With many noise draws: mean within a fifth of a posterior sd, sd within a tenth. With one
    draw it is wider.
    """
    x = torch.randn(150)
    grid = torch.linspace(0.2, 3.0, 2001)
    exact = dist.Gamma(2.0 + 75, 2.0 + 0.5 * x.square().sum()).log_prob(grid)
    mean, sd = moments(exact[:, None], grid)
    many_mean, many_sd = posterior_moments(100, x)
    assert abs(many_mean - mean) < 0.2 * sd
    assert many_sd == pytest.approx(sd, rel=0.1)
    _, one_sd = posterior_moments(1, x)
    assert one_sd > 1.1 * sd


def test_stock_nuts_samples_it():
    """Mean precision within five standard errors of 10 effective draws, and half an sd for the
    noise in the noise.
    """
    x = torch.randn(150)
    frozen = NCE(num_noise=20, noise=NOISE).freeze(with_log_z(lambda a: None), x)
    mcmc = MCMC(
        NUTS(surrogate(with_log_z(lambda a: None), frozen), max_tree_depth=4),
        num_samples=60,
        warmup_steps=50,
        disable_progbar=True,
    )
    mcmc.run(x)
    draws = mcmc.get_samples()
    exact = dist.Gamma(77.0, 2.0 + 0.5 * x.square().sum())
    assert abs(draws["a"].mean() - exact.mean) < exact.stddev * (5 / math.sqrt(10) * 0.5 + 0.5)
    log_z = exact_log_z(draws["a"].mean())
    assert draws["x_log_normalizer"].mean().item() == pytest.approx(log_z.item(), abs=0.15)


def test_fresh_noise_is_refused():
    for make in OBJECTIVES.values():
        target = surrogate(model, make())
        mcmc = MCMC(NUTS(target), num_samples=2, warmup_steps=2, disable_progbar=True)
        with pytest.raises(RuntimeError, match=r"site 'x' draws fresh noise .*: freeze it first"):
            mcmc.run(torch.randn(5))


def test_fresh_noise_is_not_a_fixed_target():
    """What the refusal is for: the density of one and the same point changes from call to call."""
    x, objective = torch.randn(12), NCE(num_noise=3)
    values = {
        objective.site_log_prob("x", quadratic(torch.tensor(1.3)), x).sum().item() for _ in range(3)
    }
    assert len(values) == 3


# --- several sites


def two_sites(x, y):
    a = pyro.sample("a", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", quadratic(a), obs=x)
        pyro.sample("y", quadratic(2 * a), obs=y)


def test_one_frozen_objective_per_site():
    x, y = torch.randn(2, 10)
    nce, ed = NCE(num_noise=3), EnergyDiscrepancy()
    frozen = {"x": nce.freeze(two_sites, x, y), "y": ed.freeze(two_sites, x, y)}
    target = poutine.condition(
        surrogate(two_sites, frozen),
        {"a": torch.tensor(0.9), "x_log_normalizer": torch.tensor(0.1)},
    )
    trace = poutine.trace(target).get_trace(x, y)
    assert "y_log_normalizer" not in trace.nodes  # the other objective's business
    trace.compute_log_prob()
    at_x = nce.per_datum(
        quadratic(torch.tensor(0.9)), x, frozen["x"].contrasts["x"], torch.tensor(0.1)
    )
    at_y = ed.per_datum(
        quadratic(torch.tensor(1.8)), y, frozen["y"].contrasts["y"], torch.zeros(())
    )
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], -at_x, rtol=0, atol=1e-12)
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], -at_y, rtol=0, atol=1e-12)


def test_one_objective_for_both_sites():
    x, y = torch.randn(2, 10)
    frozen = NCE(num_noise=3).freeze(two_sites, x, y)
    nodes = poutine.trace(surrogate(two_sites, frozen)).get_trace(x, y).nodes
    assert {"x_log_normalizer", "y_log_normalizer"} < set(nodes)
    assert not torch.equal(frozen.contrasts["x"].points, frozen.contrasts["y"].points)


def test_missing_entries_are_named():
    x, y = torch.randn(2, 10)
    frozen = NCE(num_noise=3).freeze(two_sites, x, y)
    with pytest.raises(ValueError, match=r"no objective for EBM site 'y'; .*\['x'\]"):
        poutine.trace(surrogate(two_sites, {"x": frozen})).get_trace(x, y)
    frozen = NCE(num_noise=3).freeze(model, x)
    with pytest.raises(KeyError, match="'y' was not in the model when the objective was frozen"):
        poutine.trace(surrogate(two_sites, frozen)).get_trace(x, y).log_prob_sum()


def test_a_latent_site_keeps_its_own_density():
    """MCMC samples it through its energy; the guard still watches what its energy depends on."""

    def model(x):
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        z = pyro.sample("z", EnergyDistribution(lambda z: 0.5 * a * z**2, event_shape=()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: 0.5 * (x - z) ** 2, base=NOISE), obs=x)

    x = torch.randn(8)
    frozen = RankingNCE(num_noise=3).freeze(model, x)
    a = torch.tensor(1.2, requires_grad=True)
    target = poutine.condition(surrogate(model, frozen), {"a": a, "z": torch.tensor(0.7)})
    trace = poutine.trace(target).get_trace(x)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].item() == pytest.approx(-0.5 * 1.2 * 0.49)
    with pytest.raises(MissingNormalizerError, match="'z'"):
        trace.log_prob_sum().backward()


# --- what cannot be frozen


def test_a_subsample_cannot_be_frozen():
    def subsampling(x):
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("x", quadratic(torch.tensor(1.0)), obs=x[rows])

    with pytest.raises(
        ValueError, match=r"plate 'data' is subsampled: 5 of 20 rows .*take subsample_size away"
    ):
        NCE().freeze(subsampling, torch.randn(20))


@pytest.mark.parametrize("make", [NCE, KALE, DonskerVaradhan])
def test_conditional_models_are_refused(make):
    context = torch.randn(20)

    def conditional(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: -slope * context * x, base=NOISE.expand([20]))
            pyro.sample("x", ebm, obs=x)

    with pytest.raises(ValueError, match="depends on row-wise values other than x"):
        make().freeze(conditional, torch.randn(20))
    RankingNCE().freeze(conditional, torch.randn(20))


def test_models_without_a_density_or_without_a_site():
    prior = dist.Normal(torch.tensor(0.0), 1.0)

    def implicit(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", GeneralizedEBM(lambda z: 2 * z, prior, lambda x: x**2), obs=x)

    with pytest.raises(ValueError, match="needs a density, and GeneralizedEBM site 'x' has none"):
        NCE().freeze(implicit, torch.randn(4))
    KALE().freeze(implicit, torch.randn(4))

    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", NOISE, obs=x)

    with pytest.raises(ValueError, match="no EnergyDistribution site"):
        NCE().freeze(plain, torch.randn(4))


# --- details


def test_contrast_of_the_guide():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(50.0, 1e-3))

    frozen = NCE(num_noise=3).freeze(model, torch.randn(6), guide=guide)
    assert (frozen.contrasts["x"].points - 50.0).abs().max() < 0.1


@pytest.mark.parametrize("make", [NCE, KALE, DonskerVaradhan])
def test_masked_padding_of_a_frozen_objective(make):
    """The density does not see the padding, be it NaN."""
    x, pool = torch.randn(6), torch.linspace(-2.0, 2.0, 18).reshape(3, 6)
    values = []
    for padding in (0, 4):
        rows = torch.cat([torch.arange(6), torch.zeros(padding, dtype=torch.long)])
        padded = torch.cat([x, torch.full((padding,), float("nan"))])
        mask = torch.arange(6 + padding) < 6

        def fixed(x, mask=mask):
            with pyro.plate("data", len(x)), poutine.mask(mask=mask):
                pyro.sample("x", quadratic(torch.tensor(0.8)), obs=x)

        objective = make()

        def draw(p, x, noise, rows=rows):
            return Contrast(pool[:, rows], NOISE.log_prob(pool[:, rows]), NOISE.log_prob(x))

        objective.draw = draw
        frozen = objective.freeze(fixed, padded)
        trace = density(frozen, padded, model=fixed)
        trace.compute_log_prob()
        values.append(trace.nodes["x"]["log_prob_sum"])
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-10)


def test_predictive_draws_from_the_model_itself():
    x = torch.randn(5)
    frozen = NCE(num_noise=3).freeze(model, x)
    draws = Predictive(surrogate(model, frozen), num_samples=3)(x)
    assert draws["x"].shape == (3, 5)
