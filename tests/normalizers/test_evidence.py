"""Evidence against closed forms and quadrature, and models that have none."""

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_ebm import EnergyDistribution, energy_factor
from pyro_ebm.chains import Record
from pyro_ebm.energies import Ising
from pyro_ebm.errors import MissingNormalizerError, NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.normalizers import Anchored, Box, anchored, base_importance, gauss_hermite, quadrature
from pyro_ebm.normalizers.evidence import bayes_factor, evidence
from pyro_ebm.ops.log_normalizer import LogNormalizer

LATTICE = torch.ones(4, 4)
LATTICE[0, 0] = LATTICE[2, 2] = -1.0  # its sum over bonds is 16


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def precision(x, *, shape=2.0, known=True):
    """Gaussian data whose precision has a Gamma prior, as an energy."""
    theta = pyro.sample("theta", dist.Gamma(shape, torch.tensor(1.0)))
    log_z = (lambda: 0.5 * (2 * torch.pi / theta).log()) if known else None
    law = EnergyDistribution(lambda x: theta * x**2 / 2, event_shape=(), log_normalizer=log_z)
    with pyro.plate("n", len(x)):
        pyro.sample("x", law, obs=x)


def evidence_of_precision(x, shape=2.0):
    n, b = len(x), 1.0 + float(x.square().sum()) / 2
    a = shape + n / 2
    constant = math.lgamma(a) - math.lgamma(shape) - n / 2 * math.log(2 * math.pi)
    return constant - a * math.log(b)


def exact_draws(x, shape=2.0):
    a, b = shape + len(x) / 2, 1.0 + x.square().sum() / 2
    return {"theta": dist.Gamma(a, b).sample((20, 100))}


def lattice(x, log_z=None):
    """One lattice: there is nothing to leave out."""
    coupling = pyro.sample("coupling", dist.Uniform(0.0, torch.tensor(1.0)))
    energy = Ising(coupling, (4, 4))
    known = energy.log_normalizer if log_z is None else lambda: log_z(energy.natural())
    pyro.sample("x", EnergyDistribution(energy, log_normalizer=known), obs=x)


def evidence_of_lattice():
    """By the trapezoidal rule on 20 000 steps."""
    k = torch.linspace(0.0, 1.0, 20_001)
    values = (16 * k - Ising(k, (4, 4)).log_normalizer()).exp()
    return float(torch.trapezoid(values, k).log())


def draws_of_lattice(num):
    k = torch.linspace(0.0, 1.0, 20_001)
    weights = (16 * k - Ising(k, (4, 4)).log_normalizer()).exp()
    at = torch.multinomial(weights, num[0] * num[1], replacement=True)
    return {"coupling": (k[at] + 5e-5 * (torch.rand(len(at)) - 0.5)).clamp(1e-6, 1).reshape(num)}


def test_the_bridge_is_the_closed_form():
    x = torch.randn(20) / 2**0.5
    seen = evidence(precision, x)
    assert seen.is_trusted
    assert abs(float(seen.value) - evidence_of_precision(x)) < 5 * float(seen.stderr) < 0.05


def test_sums_over_many_rows_in_single_precision_are_rounded():
    """100 000 rows: nats by the tens of thousands have an error in their third decimal."""
    torch.set_default_dtype(torch.float32)
    x = torch.randn(100_000)
    draws = {n: d.reshape(20, 100) for n, d in exact_draws(x).items()}
    seen = evidence(precision, x, posterior=draws)
    assert float(seen.stderr) >= 2.0**-23 * float(seen.value.abs()) / 12**0.5 > 1e-3
    assert abs(float(seen.value) - evidence_of_precision(x.double())) < 5 * float(seen.stderr)


def test_two_latents_in_closed_form():
    """A line through points with Gaussian noise: the data are jointly Gaussian."""
    t, noise = torch.linspace(-1.0, 1.0, 8), 0.5

    def line(y):
        coef = pyro.sample("coef", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("n", len(t)):
            pyro.sample("y", dist.Normal(coef[0] + coef[1] * t, noise), obs=y)

    design = torch.stack([torch.ones(8), t], -1)
    covariance = 4.0 * design @ design.T + noise**2 * torch.eye(8)
    y = torch.linspace(0.0, 2.0, 8)
    exact = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(y)
    precision_of_posterior = torch.eye(2) / 4.0 + design.T @ design / noise**2
    mean = torch.linalg.solve(precision_of_posterior, design.T @ y / noise**2)
    law = dist.MultivariateNormal(mean, precision_matrix=precision_of_posterior)
    seen = evidence(
        line,
        y,
        posterior={"coef": law.sample((20, 100)), "unused": torch.arange(100.0).expand(20, -1)},
    )
    assert seen.is_trusted
    assert abs(float(seen.value - exact)) < 5 * float(seen.stderr) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["stepping_stones", "thermodynamic"])
def test_from_the_prior(method):
    x = torch.randn(20) / 2**0.5
    seen = evidence(precision, x, method=method)
    assert seen.is_trusted
    assert seen.start == "prior"
    assert abs(float(seen.value) - evidence_of_precision(x)) < 5 * float(seen.stderr) < 0.3


@pytest.mark.parametrize(
    "method", ["bridge", pytest.param("stepping_stones", marks=pytest.mark.slow)]
)
def test_of_shares_whose_density_is_rounded_to_a_constant_far_out(method):
    """Where a share is the smallest number that there is; what is looked for far out is that."""
    prior, counts = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([3.0, 2.0, 1.0])

    def shares(y):
        p = pyro.sample("p", dist.Dirichlet(prior))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)

    draws = {"p": dist.Dirichlet(prior + counts).sample((20, 100))}
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    seen = evidence(shares, y, method=method, posterior=draws if method == "bridge" else None)
    gained = torch.lgamma(prior + counts) - torch.lgamma(prior)
    exact = gained.sum() - math.lgamma(10.0) + math.lgamma(4.0)
    assert abs(float(seen.value - exact)) < 5 * float(seen.stderr) < 0.1


SIGNS = torch.tensor([-1.2, -0.8, 1.5, 2.0, 1.1])


def two_signs(y):
    """A mixture of two normals, whose signs are enumerated."""
    w = pyro.sample("w", dist.Beta(torch.tensor(2.0), 2.0))
    with pyro.plate("n", len(y)):
        sign = pyro.sample("sign", dist.Bernoulli(w))
        pyro.sample("y", dist.Normal(2 * sign - 1, 1.0), obs=y)


def on_a_grid(log_p, low, high):
    """Draws of a density on an interval, and the log of its integral, by the midpoint rule."""
    step = (high - low) / 20_000
    at = low + step * (torch.arange(20_000) + 0.5)
    values = log_p(at)
    chosen = at[torch.multinomial(values.softmax(0), 4000, replacement=True)]
    return chosen.reshape(20, 200), float(values.logsumexp(0)) + math.log(step)


def log_p_of_two_signs(w):
    up, down = (dist.Normal(mean, 1.0).log_prob(SIGNS[:, None]) for mean in (1.0, -1.0))
    rows = torch.logaddexp(w.log() + up, torch.log1p(-w) + down)
    return rows.sum(0) + dist.Beta(2.0, 2.0).log_prob(w)


@pytest.mark.parametrize("enumerate_", [None, "parallel"])
def test_discrete_latents_are_enumerated(enumerate_):
    draws, exact = on_a_grid(log_p_of_two_signs, 0.0, 1.0)
    model = config_enumerate(two_signs, enumerate_) if enumerate_ else two_signs
    seen = evidence(model, SIGNS, posterior={"w": draws})
    assert abs(float(seen.value) - exact) < 5 * float(seen.stderr) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("method", ["stepping_stones", "thermodynamic"])
def test_discrete_latents_are_enumerated_from_the_prior(method):
    exact = on_a_grid(log_p_of_two_signs, 0.0, 1.0)[1]
    seen = evidence(two_signs, SIGNS, method=method)
    assert abs(float(seen.value) - exact) < 5 * float(seen.stderr) < 0.1


ANGLES = torch.tensor([2.6, 2.9, 3.1, -3.1, -2.8])
OF_ANGLES = dist.VonMises(torch.tensor(0.0), 0.5)


def angles_on_one_period(y):
    mean = pyro.sample("mean", dist.Uniform(torch.tensor(0.0), 2 * math.pi))
    pyro.factor("prior", OF_ANGLES.log_prob(mean) + math.log(2 * math.pi))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.VonMises(mean, 4.0), obs=y)


def test_a_periodic_prior_on_one_period():
    def log_p(mean):
        return OF_ANGLES.log_prob(mean) + dist.VonMises(mean, 4.0).log_prob(ANGLES[:, None]).sum(0)

    draws, exact = on_a_grid(log_p, 0.0, 2 * math.pi)
    seen = evidence(angles_on_one_period, ANGLES, posterior={"mean": draws})
    assert abs(float(seen.value) - exact) < 5 * float(seen.stderr) < 0.02


def test_one_lattice():
    seen = evidence(lattice, LATTICE, posterior=draws_of_lattice((20, 200)))
    assert abs(float(seen.value) - evidence_of_lattice()) < 5 * float(seen.stderr) < 0.05


def test_one_lattice_with_an_anchored_log_z():
    """The family knows log Z at the first anchor, so that the constant is right as well."""
    anchors = torch.tensor([[0.05], [0.2], [0.35], [0.5], [0.7], [0.9]])
    log_z = anchored(Ising(0.0, (4, 4)), anchors, num_draws=4000)
    seen = evidence(lattice, LATTICE, log_z, posterior=draws_of_lattice((20, 200)))
    assert abs(float(seen.value) - evidence_of_lattice()) < 4 * float(seen.stderr) < 0.6


def near_anchors():
    anchors = torch.tensor([[0.1], [0.2], [0.3]])
    return anchored(Ising(0.0, (8, 8)), anchors, num_draws=500)


def wide(x, log_z):
    energy = Ising(pyro.sample("k", dist.Normal(torch.tensor(0.0), 1.0)), (8, 8))
    law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
    pyro.sample("x", law, obs=x)


@pytest.mark.filterwarnings("ignore:log Z was asked")
def test_a_path_leads_where_held_draws_tell_nothing():
    draws = {"k": 0.2 + 0.01 * torch.randn(20, 50)}
    log_z = near_anchors()
    with pytest.raises(NonFiniteEnergyError, match='near their anchors.* use method="bridge"'):
        evidence(wide, torch.ones(8, 8), log_z, posterior=draws, method="stepping_stones")


@pytest.mark.filterwarnings("ignore:log Z was asked")
def test_a_bridge_names_positions_where_held_draws_tell_nothing():
    """The proposal is as wide as the draws, which are between the anchors."""
    draws = {"k": 0.05 + 0.3 * torch.rand(20, 50)}
    found = evidence(wide, torch.ones(8, 8), near_anchors(), posterior=draws)
    assert any("is not told at" in doubt for doubt in found.doubts)
    assert not any("return inf" in doubt for doubt in found.doubts)


def test_chains_that_diverge_are_a_doubt(monkeypatch):
    """Whether they are drawn or given."""
    x = torch.randn(20)
    diverging = Record(exact_draws(x), {"diverging": torch.ones(20, 100)})
    monkeypatch.setattr(sys.modules[evidence.__module__], "_drawn", lambda *args: diverging)
    for found in (evidence(precision, x), evidence(precision, x, posterior=diverging)):
        assert any("100.0% of the trajectories diverge" in doubt for doubt in found.doubts)


EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(centred):
    """Eight schools."""
    mean, sd = pyro.sample("mean", dist.Normal(0.0, 5.0)), pyro.sample("sd", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(mean, sd) if centred else dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z if centred else mean + sd * z, ERRORS), obs=EFFECTS)


def evidence_of_schools():
    """The effects in closed form, mean and log sd by the rectangle rule."""
    log_sd, mean = torch.linspace(-12.0, 14.0, 2001)[:, None], torch.linspace(-50.0, 50.0, 501)
    sd = log_sd.exp()
    log_p = dist.HalfCauchy(5.0).log_prob(sd) + log_sd + dist.Normal(0.0, 5.0).log_prob(mean)
    for y, error in zip(EFFECTS, ERRORS, strict=True):
        log_p = log_p + dist.Normal(mean, (sd**2 + error**2).sqrt()).log_prob(y)
    return float(log_p.flatten().logsumexp(0)) + math.log(26.0 / 2000 * 100.0 / 500)


def of_schools(seed, *, centred):
    pyro.set_rng_seed(seed)
    mcmc = MCMC(HMC(schools), 200, num_chains=20, disable_progbar=True)
    mcmc.run(centred)
    return evidence(schools, centred, posterior=mcmc)


def test_a_hierarchy_whose_chains_mix_is_trusted():
    found = of_schools(5, centred=False)
    assert evidence_of_schools() == pytest.approx(-31.3113, abs=1e-3)
    assert abs(float(found.value) - evidence_of_schools()) < 4 * float(found.stderr) < 0.2
    assert found.is_trusted


def test_a_centred_hierarchy_is_a_doubt():
    """Its chains hardly enter the neck, where they do not diverge either."""
    doubts = of_schools(0, centred=True).doubts
    assert any(doubt.startswith("rank R-hat of") for doubt in doubts)


@pytest.mark.slow
@pytest.mark.parametrize(("centred", "trusted"), [(True, False), (False, True)])
def test_a_hierarchy_by_chains_of_our_own(centred, trusted):
    pyro.set_rng_seed(50)
    assert evidence(schools, centred).is_trusted is trusted


def tilt(x, log_z):
    """Standard normals tilted to a precision: log Z by held draws of the base."""
    theta = pyro.sample("u", dist.Normal(torch.tensor(0.0), 1.0)).mul(0.15).exp()
    base = dist.Normal(torch.tensor(0.0), 1.0)
    law = EnergyDistribution(lambda x: (theta - 1) * x**2 / 2, base)
    law = law.with_log_normalizer(lambda bare=law: log_z(bare))
    with pyro.plate("n", len(x)):
        pyro.sample("x", law, obs=x)


def posterior_of_tilt(x):
    """Nodes, their shares of the mass, and the evidence, by the trapezoidal rule."""
    u = torch.linspace(-6.0, 6.0, 20_001)
    rows = dist.Normal(0.0, (-0.075 * u).exp()[:, None]).log_prob(x).sum(1)
    log_p = dist.Normal(0.0, 1.0).log_prob(u) + rows
    return u, log_p.softmax(0), float(torch.trapezoid(log_p.exp(), u).log())


def standardized_error(x, **options):
    u, shares, exact = posterior_of_tilt(x)
    draws = {"u": u[torch.multinomial(shares, 600, replacement=True)].reshape(20, 30)}
    log_z = base_importance(dist.Normal(torch.tensor(0.0), 1.0), num_draws=3000)
    seen = evidence(tilt, x, log_z, posterior=draws, **options)
    return (float(seen.value) - exact) / float(seen.stderr)


def test_the_error_of_log_z_is_in_that_of_the_evidence():
    """Forty rows count an error of log Z forty times.

    Root mean squares of 20 standardized errors scatter by .16: half more or less error is seen.
    """
    pyro.set_rng_seed(3)
    x = dist.Normal(0.0, 1.1).sample((40,))
    z = torch.tensor([standardized_error(x) for _ in range(20)])
    assert 0.5 < float(z.square().mean().sqrt()) < 1.5


@pytest.mark.slow  # draws of the prior, one by one
def test_the_error_of_log_z_is_in_that_from_the_prior():
    pyro.set_rng_seed(4)
    x = dist.Normal(0.0, 1.1).sample((40,))
    assert abs(standardized_error(x, method="thermodynamic")) < 4


def test_the_functions_are_themselves_again():
    """After they were resampled for the error."""
    x = dist.Normal(0.0, 1.0).sample((5,))
    log_z = base_importance(dist.Normal(torch.tensor(0.0), 1.0), num_draws=500)
    law = EnergyDistribution(lambda x: 0.1 * x**2, dist.Normal(torch.tensor(0.0), 1.0))
    before = log_z(law)
    evidence(tilt, x, log_z, posterior={"u": 0.3 * torch.randn(4, 50)})
    assert torch.equal(log_z(law), before)


def test_a_log_z_of_few_chains_has_no_error():
    draws = Ising(0.2, (4, 4)).statistics(Ising(0.2, (4, 4)).sample((5, 200))).double()
    log_z = Anchored(torch.tensor([[0.2]]), draws[None], log_normalizer=9.0)
    found = evidence(one_lattice_through, log_z, Ising(0.2, (4, 4)).sample())
    assert any("of EBM sites is unknown: a bootstrap" in doubt for doubt in found.doubts)


def test_the_ratio_of_two_models():
    x = torch.randn(30)
    one, other = (
        evidence(precision, x, posterior=exact_draws(x, a), kwargs={"shape": a}) for a in (2.0, 9.0)
    )
    ratio = bayes_factor(one, other)
    exact = evidence_of_precision(x) - evidence_of_precision(x, 9.0)
    assert abs(float(ratio.value) - exact) < 5 * float(ratio.stderr) < 0.1
    assert str(ratio).startswith("log Bayes factor = ")
    few = LogNormalizer(torch.tensor(0.0), torch.tensor(0.1), ess=3.0)
    assert "second: effective sample size 3" in str(bayes_factor(one, few))
    with pytest.raises(ValueError, match="with standard errors"):
        bayes_factor(one, LogNormalizer(torch.tensor(0.0)))


# --- models that have none


def constant(x):
    """Nothing is inferred through the energy, and its log Z counts all the same."""
    pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", EnergyDistribution(lambda x: x**4, event_shape=()), obs=x)


def with_factor(x):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    energy_factor("near", lambda t: t.square().sum(-1), theta)


def improper(x):
    theta = pyro.sample("theta", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("x", dist.Normal(theta, 1.0), obs=x[0])


def periodic(x):
    mean = pyro.sample("mean", OF_ANGLES.expand([2]).to_event(1))
    pyro.sample("x", dist.VonMises(mean, 4.0).to_event(1), obs=x[:2])


def part_of(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x), subsample_size=2) as i:
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x[i])


def masked(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta, 1.0), obs=x[0])
    with pyro.plate("n", 2), pyro.poutine.mask(mask=torch.tensor([True, False])):
        pyro.sample("rest", dist.Normal(0.0, 1.0))


def scaled(x):
    with pyro.poutine.scale(scale=2.0):
        precision(x)


BAD = {
    "scaled": (scaled, ValueError, "site 'theta' is scaled by 2: .* take poutine.scale away"),
    "missing": (lambda x: precision(x, known=False), MissingNormalizerError, "log Z is unknown"),
    "constant": (constant, MissingNormalizerError, "off by it even if it is constant"),
    "factor": (with_factor, MissingNormalizerError, "energy_factor 'near' has no log Z"),
    "improper": (improper, ValueError, "site 'theta' has an improper prior"),
    "periodic": (periodic, ValueError, r"'mean' has a periodic prior, .*from Uniform\(a, a \+"),
    "subsampled": (part_of, ValueError, "plate 'n' is subsampled"),
    "draws": (precision, ValueError, "the posterior has no draws of theta, got"),
}


@pytest.mark.parametrize("case", BAD)
def test_models_without(case):
    model, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        evidence(model, torch.randn(5), posterior={"z": torch.zeros(4, 50)})


@pytest.mark.filterwarnings("ignore:.*the density does not depend on")
def test_a_latent_without_a_density():
    with pytest.raises(ValueError, match="a latent has no density at all"):
        evidence(masked, torch.randn(5))


def test_ways_are_named():
    with pytest.raises(ValueError, match="method must be one of bridge, stepping_stones"):
        evidence(precision, torch.randn(5), method="harmonic mean")


def test_errors_of_a_bayes_factor_add_in_squares():
    one, other = (
        LogNormalizer(torch.tensor(v), torch.tensor(e)) for v, e in ((1.0, 3.0), (0.0, 4.0))
    )
    assert float(bayes_factor(one, other).stderr) == pytest.approx(5.0)


def test_the_error_of_a_constant_is_in_that_of_the_evidence():
    """Of one lattice whose log Z at the anchor is known to a nat: known to a tenth by 50 draws."""
    draws = Ising(0.2, (4, 4)).statistics(Ising(0.2, (4, 4)).sample((50, 20))).double()
    log_z = Anchored(torch.tensor([[0.2]]), draws[None])
    posterior = {"k": 0.15 + 0.1 * torch.rand(20, 100)}
    known = log_z.with_log_normalizer(LogNormalizer(torch.tensor(9.0), torch.tensor(1.0)))
    found = evidence(one_lattice_through, known, LATTICE, posterior=posterior)
    assert 0.6 < float(found.stderr) < 1.5
    exactly = evidence(
        one_lattice_through, log_z.with_log_normalizer(9.0), LATTICE, posterior=posterior
    )
    assert float(exactly.stderr) < 0.3
    assert float(found.value - exactly.value) == pytest.approx(0.0, abs=0.1)


def test_a_constant_that_two_models_share_cancels():
    """A doubt of each of the evidences is none of their ratio; one of another function stays."""
    draws = Ising(0.2, (4, 4)).statistics(Ising(0.2, (4, 4)).sample((50, 20))).double()
    one, other = (Anchored(torch.tensor([[0.2]]), draws[None]) for _ in range(2))
    posterior = {"k": 0.15 + 0.1 * torch.rand(20, 100)}
    found = [evidence(one_lattice_through, z, LATTICE, posterior=posterior) for z in (one, other)]

    def told(*pair):
        return [d.split(":")[0] for d in bayes_factor(*pair).doubts if "constant only" in d]

    assert told(found[0], found[0]) == []
    assert told(*found) == ["both"]
    assert told(found[0], LogNormalizer(*torch.ones(2))) == ["first"]


ROWS = torch.linspace(-2.0, 2.0, 40)
EXACT = 0.5 * math.log(2 * math.pi)


def estimated(*parts):
    """Sites of standard normals by energies, each with its estimate of log Z and its mask."""
    mean = pyro.sample("mean", dist.Normal(0.0, torch.tensor(1.0)))
    pyro.sample("y", dist.Normal(mean, 1.0), obs=ROWS[0])
    for i, (estimate, mask) in enumerate(parts):
        law = EnergyDistribution(lambda x: x**2 / 2, event_shape=(), log_normalizer=estimate)
        with pyro.plate(f"n{i}", len(ROWS)):
            pyro.sample(f"x{i}", law.mask(mask), obs=ROWS)


def evidence_of_estimated(*parts):
    """The posterior of the mean is N(y / 2, 1 / 2)."""
    draws = ROWS[0] / 2 + 0.5**0.5 * torch.randn(20, 50)
    return evidence(estimated, *parts, posterior={"mean": draws})


def estimate_of(stderr, **facts):
    return LogNormalizer(torch.tensor(EXACT), torch.as_tensor(stderr), **facts)


def test_the_error_of_an_estimated_constant_counts_for_every_element():
    """Linearly for one estimate, in squares for different ones; what a mask hides does not."""
    one, other, half = estimate_of(0.1), estimate_of(0.2), ROWS > 0
    assert float(evidence_of_estimated((one, True)).stderr) == pytest.approx(4.0, abs=0.01)
    assert float(evidence_of_estimated((one, half)).stderr) == pytest.approx(2.0, abs=0.01)
    twice = evidence_of_estimated((one, True), (one, half))
    assert float(twice.stderr) == pytest.approx(6.0, abs=0.01)
    both = evidence_of_estimated((one, True), (other, half))
    assert float(both.stderr) == pytest.approx(32.0**0.5, abs=0.01)
    assert float(both.own_stderr) < 0.01


def test_a_batch_of_estimates_errs_by_the_row():
    each = torch.linspace(0.0, 0.1, 40)
    batch = LogNormalizer(torch.full((40,), EXACT), each)
    found = evidence_of_estimated((batch, ROWS > 0))
    assert float(found.stderr) == pytest.approx(float(each[ROWS > 0].sum()), abs=0.01)


def test_doubts_of_an_estimated_constant_are_those_of_the_evidence():
    few = evidence_of_estimated((estimate_of(0.1, ess=53.0), True))
    assert few.doubts == ("log Z of EBM site 'x0': effective sample size 53 < 100",)
    unknown = evidence_of_estimated((estimate_of(float("nan")), True))
    assert unknown.doubts == ("log Z of EBM site 'x0': its standard error is not known",)
    assert math.isnan(float(unknown.stderr))
    assert evidence_of_estimated((estimate_of(float("nan"), ess=5.0), False)).is_trusted


def test_an_estimated_constant_that_two_models_share_cancels():
    """As often as both count it, and with it its doubts."""
    shared, other = estimate_of(0.1, ess=53.0), estimate_of(0.2)
    all_rows, half = (evidence_of_estimated((shared, mask)) for mask in (True, ROWS > 0))
    ratio = bayes_factor(all_rows, evidence_of_estimated((shared, True), (other, ROWS > 1)))
    assert float(ratio.stderr) == pytest.approx(2.0, abs=0.01)
    assert ratio.doubts == ()
    less = bayes_factor(half, all_rows)
    assert float(less.stderr) == pytest.approx(2.0, abs=0.01)
    assert less.doubts == ("both: log Z of EBM site 'x0': effective sample size 53 < 100",)


def test_a_log_z_that_is_made_at_the_latents_is_no_constant():
    """Of the quadrature at some draw of the prior nothing is left."""
    box = Box(torch.tensor([-8.0]), torch.tensor([8.0]), 41)

    def model(x):
        theta = pyro.sample("theta", dist.Gamma(2.0, torch.tensor(1.0)))
        law = EnergyDistribution(
            lambda x: theta * x**2 / 2, event_shape=(), batch_shape=theta.shape
        )
        with pyro.plate("n", len(x)):
            pyro.sample("x", law.with_log_normalizer(quadrature(law, box=box)), obs=x)

    assert evidence(model, ROWS, posterior=exact_draws(ROWS)).constants == ()


@pytest.mark.filterwarnings("ignore:log Z was asked")
def test_draws_where_held_draws_tell_nothing_are_named():
    draws = {"k": 2.0 + 0.01 * torch.randn(20, 50)}
    with pytest.raises(NonFiniteEnergyError, match="is not told at some of these draws: hold more"):
        evidence(wide, torch.ones(8, 8), near_anchors(), posterior=draws)


def one_lattice_through(log_z, x):
    k = pyro.sample("k", dist.Uniform(torch.tensor(0.1), 0.3))
    law = EnergyDistribution(Ising(k, (4, 4)), log_normalizer=lambda: log_z(k[None]))
    pyro.sample("x", law, obs=x)


def test_a_log_z_without_its_constant_is_a_doubt():
    """What is relative cannot be an evidence, whatever its error says."""
    draws = Ising(0.2, (4, 4)).statistics(Ising(0.2, (4, 4)).sample((50, 20))).double()
    x = Ising(0.2, (4, 4)).sample()
    for constant, doubted in ((None, True), (float(Ising(0.2, (4, 4)).log_normalizer()), False)):
        log_z = Anchored(torch.tensor([[0.2]]), draws[None], log_normalizer=constant)

        found = evidence(one_lattice_through, log_z, x)
        assert any("up to a constant only" in doubt for doubt in found.doubts) is doubted


def test_a_path_that_meets_what_is_not_finite_says_what_to_do():
    def model():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("far", torch.where(x > 1.5, torch.inf, -x.square()))

    with pytest.raises(NonFiniteEnergyError, match="minus infinity.* num_terms= .* or use method="):
        evidence(model, method="stepping_stones")


def by_nodes(x, num_nodes):
    """x ~ N(0, 1) tilted by exp(-k x^2 / 2), which is N(0, 1 / (1 + k))."""
    k = pyro.sample("k", dist.LogNormal(torch.tensor(8.0).log(), 0.1))
    law = EnergyDistribution(lambda v: 0.5 * k * v**2, dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law.with_log_normalizer(gauss_hermite(law, num_nodes=num_nodes)), obs=x)


def test_what_nodes_are_off_in_every_row_is_in_the_error():
    """Many rows of a law whose log Z errs by less than is seen of one: together by more."""
    x = torch.randn(20_000) / 3
    k = torch.linspace(7.0, 11.0, 4001)
    rows = len(x) * 0.5 * torch.log1p(k) - 0.5 * (1 + k) * x.square().sum()
    log_p = dist.LogNormal(math.log(8.0), 0.1).log_prob(k) + rows
    log_p = log_p - len(x) * 0.5 * math.log(2 * math.pi)
    exact = torch.logsumexp(log_p, 0) + (k[1] - k[0]).log()
    draws = {"k": k[torch.multinomial(log_p.softmax(0), 4000, replacement=True).reshape(4, -1)]}
    few, many = (evidence(by_nodes, x, n, posterior=draws) for n in (50, 120))
    assert float((many.value - exact).abs() / many.stderr) < 3.0
    assert float(many.stderr) < 0.05
    assert 5 * float(many.stderr) < float((few.value - exact).abs()) < float(few.stderr)


def test_draws_in_double_precision_of_a_model_in_single():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            law = EnergyDistribution(lambda y: 0.5 * y**2, event_shape=())
            law = law.with_log_normalizer(LogNormalizer(torch.tensor(0.9189385)))
            pyro.sample("y", law, obs=x @ w)

    torch.set_default_dtype(torch.float32)
    x = torch.zeros(5, 2)
    draws = {"w": torch.randn(4, 500, 2, dtype=torch.float64)}
    assert float(evidence(model, x, posterior=draws).value) == pytest.approx(-4.5947, abs=0.05)
