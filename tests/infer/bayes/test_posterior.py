"""Which way to a posterior is taken, what is said of it, and that it leads there."""

from importlib import import_module

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_models import Precision
from pyro import poutine

from pyro_ebm import EnergyDistribution
from pyro_ebm.chains import Record
from pyro_ebm.energies import ExponentialFamily, Ising
from pyro_ebm.infer.bayes.data_structure import data_structure
from pyro_ebm.infer.bayes.generalized_bayes import generalized_posterior
from pyro_ebm.infer.bayes.nce_posterior import nce_posterior
from pyro_ebm.infer.bayes.posterior import posterior, route_of
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.infer.bayes.properness import check_proper
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.ops.constraints import spins

F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(11)
    torch.set_default_dtype(F64)


class Hidden(Ising):
    """A lattice that keeps its log Z to itself."""

    is_tractable = False


class Swept(Hidden):
    """And has no exact sampler."""

    is_sampleable = False


# --- models by what their data are


def coupling():
    return pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 0.6))


def lattice(family, x):
    pyro.sample("x", EnergyDistribution(family(coupling(), x.shape)), obs=x)


def precision_of_rows(x):
    precision = pyro.sample("precision", dist.Gamma(x.new_tensor(2.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x)


def unknown_of_rows(x):
    precision = pyro.sample("precision", dist.Gamma(x.new_tensor(2.0), 1.0))
    with pyro.plate("rows", len(x)):
        law = EnergyDistribution(lambda v: 0.5 * precision * (v**2).sum(-1), event_shape=(4,))
        pyro.sample("x", law, obs=x)


def regression(x, covariate):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))

    def energy(v):
        return 0.5 * ((v - slope * covariate[:, None]) ** 2).sum(-1)

    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(energy, event_shape=(4,)), obs=x)


def groups(x):
    rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
    with pyro.plate("groups", x.shape[1], dim=-1):
        precision = pyro.sample("precision", dist.Gamma(3.0, rate))
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x)


def lattices(x):
    """A coupling for each of some lattices."""
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.2), 0.1))
    with pyro.plate("groups", len(x)):
        k = pyro.sample("k", dist.Normal(mean, 0.1))
        pyro.sample("x", EnergyDistribution(Hidden(k, x.shape[1:])), obs=x)


def words(x):
    """Rows of three spins, which can be summed over."""
    pull = pyro.sample("pull", dist.Normal(x.new_zeros(()), 1.0))
    law = EnergyDistribution(lambda s: -pull * s.prod(-1), support=spins, event_shape=(3,))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


def many_words(x):
    """A lattice of spins without a family."""
    k = coupling()

    def energy(s):
        return -k * ((s * s.roll(1, -1)).sum((-2, -1)) + (s * s.roll(1, -2)).sum((-2, -1)))

    law = EnergyDistribution(energy, support=spins, event_shape=x.shape)
    pyro.sample("x", law, obs=x)


def known_rows(x):
    a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 1.0))
    law = EnergyDistribution(
        lambda v: 0.5 * a * v**2,
        event_shape=(),
        log_normalizer=lambda: 0.5 * (2 * torch.pi / a).log(),
    )
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


def spin_lattice(n):
    return torch.where(torch.rand(n, n) < 0.7, 1.0, -1.0)


def clustered(n):
    """A lattice whose coupling is not at the edge of the prior."""
    torch.manual_seed(3)
    return Ising(torch.tensor(0.3, dtype=F64), (n, n)).sample()


KINDS = {
    "one observation": (lattice, (Hidden, spin_lattice(6))),
    "independent rows": (precision_of_rows, (torch.randn(30),)),
    "conditional": (regression, (torch.randn(30, 4), torch.randn(30))),
    "hierarchical": (groups, (torch.randn(4, 3),)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_data(kind):
    model, args = KINDS[kind]
    structure = data_structure(model, *args)
    assert structure.kind == kind
    assert structure.groups == ("groups" if kind == "hierarchical" else None)


def test_rows_that_count():
    def model(x):
        with poutine.mask(mask=torch.tensor([True, False, True])):
            precision_of_rows(x)

    assert data_structure(model, torch.ones(3)).sites[0].num_rows == 2


def test_covariates_of_a_family_make_rows_conditional():
    def model(x, covariate):
        slope = pyro.sample("slope", dist.Gamma(x.new_tensor(2.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(Precision(slope * covariate)), obs=x)

    assert data_structure(model, torch.ones(3), torch.arange(1.0, 4.0)).kind == "conditional"
    assert data_structure(model, torch.ones(3), torch.ones(3)).kind == "independent rows"


# --- the ways

FEW = {"num_samples": 20, "warmup_steps": 20, "num_chains": 8}
WAYS = {
    "known": (known_rows, (torch.randn(20),), "exact log Z", "log Z of every EBM site is known"),
    "summed": (words, (torch.ones(20, 3),), "exact log Z", "a sum over 8 states"),
    "drawn": (lattice, (Hidden, spin_lattice(6)), "exchange", "can be drawn from exactly"),
    "groups": (lattices, (torch.ones(2, 5, 5),), "exchange", "plate 'groups' are accepted one by"),
    "swept": (lattice, (Swept, spin_lattice(6)), "exchange by sweeps", "no exact sampler"),
    "noise": (unknown_of_rows, (torch.randn(50, 4),), "NCE", "data can be told from noise"),
    "regression": (
        regression,
        (torch.randn(50, 4), torch.randn(50)),
        "ScoreMatching",
        "rows (50) with a law each",
    ),
    "one discrete": (many_words, (clustered(8),), "PseudoLikelihood", "one dependent"),
}


SLOW = {"swept", "one discrete", "noise"}  # simulations by sweeps, five noise sets
MARKED = [pytest.param(w, marks=pytest.mark.slow if w in SLOW else ()) for w in WAYS]


@pytest.mark.parametrize("way", WAYS)
def test_the_way_follows_the_structure(way):
    model, args, method, _ = WAYS[way]
    taken = route_of(data_structure(model, *args))
    named = {"exact": "exact log Z", "nce": "NCE", "exchange": "exchange", "generalized": "Match"}
    assert named[taken] in method or (taken == "generalized" and "Pseudo" in method)


@pytest.mark.parametrize("way", MARKED)
def test_the_way_is_taken_and_explained(way):
    model, args, method, sentence = WAYS[way]
    found = posterior(model, *args, **FEW)
    assert method in found.method
    assert any(sentence in reason for reason in found.reasons), found.reasons
    assert "\n  because: " in str(found)


def test_short_chains_are_told():
    found = posterior(precision_of_rows, torch.randn(20), method="exchange", **FEW)
    assert any("the chains are too short" in remark for remark in found.remarks)


@pytest.mark.slow
def test_enumeration_and_exchange_find_what_is_exact():
    """One lattice of nine spins: its log Z by the formula, summed, and not at all."""
    x = torch.ones(3, 3)
    x[0, 0] = -1.0
    means, errors = [], []
    sizes = {"num_samples": 100, "warmup_steps": 50}
    for family, method in ((Ising, "exact"), (Swept, "exact"), (Hidden, "exchange")):
        found = posterior(lattice, family, x, method=method, **sizes)
        draws = torch.as_tensor(found.record.draws["coupling"]).mean(1)
        means.append(draws.mean())
        errors.append(draws.std() / len(draws) ** 0.5)
    k = torch.linspace(0.0, 0.6, 2001)
    states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 9).reshape(-1, 3, 3)
    bonds, counts = Ising(0.0, (3, 3)).statistics(states)[:, 0].unique(return_counts=True)
    log_z = torch.logsumexp(k[:, None] * bonds + counts.log(), 1)
    weights = (k * Ising(0.0, (3, 3)).statistics(x) - log_z).softmax(0)
    weights[[0, -1]] *= 0.5
    exact = (weights * k).sum() / weights.sum()
    for mean, error in zip(means, errors, strict=True):
        assert abs(float((mean - exact) / error)) < 5
        assert float(error) < 0.01  # the posterior's sd is about .16


# --- what is refused


def improper(x):
    rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(lambda v: -rate * v**2, event_shape=()), obs=x)


def flat_at_last(x):
    """Grows as .9 log r: too slowly."""
    one = pyro.sample("one", dist.Normal(x.new_zeros(()), 1.0))
    law = EnergyDistribution(lambda v: 0.45 * (1 + (v - one) ** 2).log(), event_shape=())
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


def cauchy(x):
    one = pyro.sample("one", dist.Normal(x.new_zeros(()), 1.0))
    law = EnergyDistribution(lambda v: (1 + (v - one) ** 2).log(), event_shape=())
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


def plain_model(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def shifted(x):
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(lambda v: (v - m) ** 4, event_shape=()), obs=x)


def latent_law(x):
    z = pyro.sample("z", EnergyDistribution(lambda v: v**4, event_shape=()))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def ridge(x):
    a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 1.0))
    law = EnergyDistribution(lambda v: 0.5 * a * (v[..., 0] - v[..., 1]) ** 2, event_shape=(2,))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


X = torch.randn(20)
X4 = torch.randn(20, 4)
BAD = {
    "no EBM": (plain_model, (X[0],), {}, ValueError, "observes no EBM"),
    "falling": (improper, (X,), {}, ValueError, "energy of site 'x' is improper"),
    "flat": (flat_at_last, (X,), {}, ValueError, "energy of site 'x' is improper"),
    "method": (precision_of_rows, (X,), {"method": "guess"}, ValueError, "'guess'"),
    "not summed": (unknown_of_rows, (X4,), {"method": "exact"}, ValueError, "inf terms"),
    "one lattice": (lattice, (Hidden, spin_lattice(6)), {"method": "nce"}, ValueError, "one"),
    "c of rows": (regression, (X4, X), {"method": "nce"}, ValueError, "one log Z for all"),
    "no family": (unknown_of_rows, (X4,), {"method": "exchange"}, TypeError, "exponential famil"),
    "known": (lattice, (Ising, spin_lattice(6)), {"method": "exchange"}, ValueError, "is known"),
    "known, noise": (
        known_rows,
        (X,),
        {"method": "nce"},
        ValueError,
        "'nce' infers log Z .* known",
    ),
    "one known": (lattice, (Ising, spin_lattice(5)), {"method": "nce"}, ValueError, "are one obs"),
    "whole numbers": (shifted, (torch.arange(20) - 10,), {}, TypeError, "call x.double"),
    "a law": (EnergyDistribution(lambda v: v**2, event_shape=()), (X,), {}, TypeError, "of a Pyro"),
    "no function": (3.0, (X,), {}, TypeError, "of a Pyro model, got float"),
    "latent EBM": (
        latent_law,
        (X[0],),
        {},
        ValueError,
        r"sites \['z'\] are latent with log Z unkn",
    ),
    "ridge": (ridge, (X4[:, :2],), {}, ValueError, "energy of site 'x' is improper"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_each(case):
    model, args, options, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        posterior(model, *args, **FEW, **options)


def test_heavy_tails_are_proper():
    assert posterior(cauchy, X, method="generalized", **FEW).record.num_chains == 8


# --- routes that must run


class Bare(ExponentialFamily):
    """A family with neither a sampler nor a kernel."""

    coefficients = ("rate",)

    def __init__(self, rate):
        super().__init__((4,), dist.constraints.independent(dist.constraints.positive, 1))
        self._set("rate", rate)

    def statistics(self, x):
        return -x.sum(-1, keepdim=True)


def waiting(x):
    rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(Bare(rate)), obs=x)


def test_a_family_without_any_draws_goes_another_way():
    """No sampler, no sweeps, no noise on the half line: score matching remains."""
    found = posterior(waiting, torch.rand(100, 4) + 0.1, **FEW)
    assert "ScoreMatching" in found.method


def test_seventeen_spins_are_summed():
    def model(x):
        k = coupling()
        law = EnergyDistribution(lambda s: -k * s.prod(-1), support=spins, event_shape=(17,))
        pyro.sample("x", law, obs=x)

    structure = data_structure(model, torch.ones(17))
    assert route_of(structure) == "exact"
    assert structure.sites[0].num_terms == 2**17


def given_back(monkeypatch, name):
    """Puts chains that disagree where a way would sample; returns what it was called with."""
    calls = []
    draws = np.linspace(0.0, 1.0, 20) + np.arange(8.0)[:, None]

    def way(*args, **kwargs):
        calls.append(kwargs)
        return Posterior(Record({"a": draws}), "of a test")

    monkeypatch.setattr(import_module("pyro_ebm.infer.bayes.posterior_ways"), name, way)
    return calls


def test_noise_posteriors_are_not_blamed_for_their_noise(monkeypatch):
    given_back(monkeypatch, "nce_posterior")
    given_back(monkeypatch, "generalized_posterior")
    found = posterior(unknown_of_rows, X4, **FEW)
    assert "data can be told from noise" in str(found)
    assert not any("chains are too short" in remark for remark in found.remarks)
    other = posterior(unknown_of_rows, X4, method="generalized", **FEW)
    assert any("chains are too short" in remark for remark in other.remarks)


def test_a_loss_where_log_z_is_known_is_one_for_the_support(monkeypatch):
    calls = given_back(monkeypatch, "generalized_posterior")
    for model, data, loss in (
        (known_rows, (X,), "ScoreMatching"),
        (lattice, (Ising, spin_lattice(5)), "PseudoLikelihood"),
    ):
        found = posterior(model, *data, method="generalized", **FEW)
        assert type(calls[-1]["loss"]).__name__ == loss
        assert found.reasons == (f"{loss} does without log Z.",)
        assert any("use method='exact'" in remark for remark in found.remarks)


def test_one_image_is_one_observation_before_its_noise_is_looked_at():
    with pytest.raises(ValueError, match="it is one observation, and NCE tells many"):
        nce_posterior(lattice, Ising, spin_lattice(5), noise=dist.Normal(0.0, 1.0))
    law = EnergyDistribution(lambda v: v**2, event_shape=())
    with pytest.raises(TypeError, match="an NCE posterior is over the latents of a Pyro model"):
        nce_posterior(law, X, noise="gaussian")


def test_rows_in_a_loop_are_looked_at_one_by_one():
    def model(x):
        a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 1.0))
        for i in pyro.plate("rows", len(x)):
            sign = -1.0 if i == 1 else 1.0
            law = EnergyDistribution(lambda v, s=sign: s * a * v**2, event_shape=())
            pyro.sample(f"x{i}", law, obs=x[i])

    assert [s.num_rows for s in data_structure(model, X[:3]).sites] == [1, 1, 1]
    with pytest.raises(ValueError, match="energy of site 'x1' is improper"):
        check_proper(model, (X[:3],), {})


def test_three_dims_are_not_integrated_unasked(monkeypatch):
    """The search for nodes alone would take minutes, and the chains hours."""

    def model(x):
        a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 1.0))
        law = EnergyDistribution(lambda v: 0.5 * a * (v**2).sum(-1), event_shape=(3,))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law, obs=x)

    given_back(monkeypatch, "nce_posterior")
    assert "data can be told from noise" in str(posterior(model, X4[:, :3], **FEW))


@pytest.mark.parametrize(
    "way",
    [
        lambda: generalized_posterior(improper, X, loss=ScoreMatching()),
        lambda: nce_posterior(improper, X, noise=dist.Normal(0.0, 2.0)),
    ],
)
def test_improper_energies_are_refused_by_ways_that_are_named(way):
    with pytest.raises(ValueError, match="energy of site 'x' is improper"):
        way()


def test_an_energy_that_is_improper_at_some_draws_of_the_prior_is_told():
    """a ~ N(1, 1), E = a x^2: at one draw in six Z is infinite, and the data say which."""

    def model(x):
        a = pyro.sample("a", dist.Normal(x.new_ones(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(lambda v: a * v**2, event_shape=()), obs=x)

    found = posterior(model, X, method="generalized", **FEW)
    assert any("of 16 draws of the prior Z of site 'x' is infinite" in r for r in found.remarks)


def on_a_base(x):
    """-(1 + a) x^2 on N(0, 1): the base does not confine it."""
    a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 1.0))
    law = EnergyDistribution(lambda v: -(1.0 + a) * v**2, dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


OFF = {
    "zeros for spins": (lattice, (Hidden, (spin_lattice(4) + 1) / 2), "lie outside of its support"),
    "NaN": (precision_of_rows, (torch.tensor([0.3, torch.nan]),), "are NaN"),
    "improper on a base": (on_a_base, (X,), "energy of site 'x' is improper"),
}


@pytest.mark.parametrize("case", OFF)
def test_data_and_laws_that_cannot_be(case):
    model, args, sentence = OFF[case]
    with pytest.raises(ValueError, match=sentence):
        posterior(model, *args, **FEW)


def test_one_draw_is_too_few_to_judge():
    sizes = {"num_samples": 1, "warmup_steps": 5, "num_chains": 2}
    found = posterior(precision_of_rows, X, method="exchange", **sizes)
    assert any("too few to tell" in remark for remark in found.remarks)


def test_padding_is_no_scale():
    def model(x):
        with poutine.mask(mask=torch.isfinite(x).all(-1)):
            unknown_of_rows(x)

    x = X4.clone()
    x[3] = torch.nan
    assert check_proper(model, (x,), {}) == ()
    assert data_structure(model, x).sites[0].num_rows == len(x) - 1
