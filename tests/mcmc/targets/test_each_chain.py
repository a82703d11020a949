"""Data per chain: the batch of C potentials is C potentials, one by one and in a graph."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_models import Precision as Calibrated

from pyro_ebm import EnergyDistribution
from pyro_ebm.mcmc import HMC, MCMC, NUTS, Exchange, Sweeps
from pyro_ebm.mcmc.exchange.exchange_target import exchange_target
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.each_chain import EachChain
from pyro_ebm.mcmc.targets.model_target import target_of_model

F64 = torch.float64
NUM = 6


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


def eager(target, q):
    return CapturedPotential(target, capture=False)(q)


class Precision(Calibrated):
    """One whose sweeps can be seen."""

    def sweep(self, x, num_sweeps):
        """Keeps no law: shows where the sweeps began."""
        return x


def groups():
    """Constrained parameters in a plate, and two data sites, one of whole numbers."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", 3):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("count", dist.Poisson(rate))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 4):
        pyro.sample("x", dist.Normal((weights * rate).sum(), scale).expand([2]).to_event(1))


def group_data():
    return {"count": torch.randint(5, (NUM, 3)), "x": torch.randn(NUM, 4, 2)}


def vector_scale():
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(torch.zeros(2), scale).to_event(1))


def branching():
    """vmap cannot follow it."""
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(m if float(m.detach()) > 0 else 2.0 * m, 1.0))


CASES = {
    "groups": (groups, group_data),
    "vectors": (vector_scale, lambda: {"x": torch.randn(NUM, 2)}),
    "one after the other": (branching, lambda: {"x": torch.randn(NUM)}),
}


def of_chain(data, c):
    return {name: value[c] for name, value in data.items()}


@pytest.mark.filterwarnings("ignore:model 'branching:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_potentials_are_those_of_the_chains_one_by_one(case):
    model, make = CASES[case]
    data = make()
    target = target_of_model(EachChain(model, data), (), {})
    assert target.is_vectorized == (model is not branching)
    q = target.draw_start(NUM)
    u, gradient = eager(target, q)
    for c in range(NUM):
        alone = target_of_model(pyro.poutine.condition(model, of_chain(data, c)), (), {})
        u_alone, gradient_alone = eager(alone, q[c : c + 1])
        torch.testing.assert_close(u[c], u_alone[0])
        torch.testing.assert_close(gradient[c], gradient_alone[0])


@pytest.mark.parametrize("case", ["groups", "vectors"])
def test_a_graph_reads_the_data_as_they_are(case):
    """Recorded once, replayed after the data have changed: no longer the old ones."""
    model, make = CASES[case]
    each = EachChain(model, make())
    target = target_of_model(each, (), {})
    potential = CapturedPotential(target)
    q = target.draw_start(NUM)
    before = potential(q)
    recorded = dict(potential._with_grad._graphs)
    each.update(make())
    after = potential(q)
    assert potential._with_grad._graphs == recorded
    assert all(graph != potential._with_grad.eager for graph in recorded.values())
    for ours, wanted in zip(after, eager(target, q), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert bool((before[0] != after[0]).all())


def test_the_data_are_copied():
    data = {"x": torch.randn(NUM, 2)}
    each = EachChain(vector_scale, data)
    data["x"].zero_()
    assert bool((each.data["x"] != 0).all())


def precisions():
    precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("rows", 5):
        pyro.sample("x", EnergyDistribution(Precision(precision)))


def test_exchange_gives_sweeps_the_chains_own_data():
    """Sweeps that move nothing end at the data: the ratio is that of the data themselves."""
    x = torch.randn(NUM, 5)
    kernel = Exchange(EachChain(precisions, {"x": x}), auxiliary=Sweeps(1))
    potential = CapturedPotential(kernel.bind())
    state = kernel.init(potential, torch.randn(NUM, 1))
    to = kernel.init(potential, torch.randn(NUM, 1))
    step = (state.extra["x"] - to.extra["x"])[..., 0]
    wanted = state.potential - to.potential - 0.5 * (step * x.square()).sum(1)
    torch.testing.assert_close(kernel.log_accept(potential, state, to), wanted)


def test_exchange_has_the_posteriors_of_all_chains():
    """Gamma(2 + n / 2, 1 + sum of squares / 2), one for every chain.

    300 chains of 60 draws: a common shift of a tenth of a posterior sd is seen.
    """
    num = 300
    x = torch.randn(num, 5) * torch.linspace(0.3, 3.0, num)[:, None]
    kernel = Exchange(EachChain(precisions, {"x": x}))
    mcmc = MCMC(kernel, 60, 100, num_chains=num, thinning=4, disable_progbar=True)
    mcmc.run()
    exact = dist.Gamma(4.5, 1.0 + 0.5 * x.square().sum(1))
    z = (mcmc.get_samples()["precision"] - exact.mean[:, None]) / exact.stddev[:, None]
    for values, wanted in ((z, 0.0), (z.square(), 1.0)):
        means = values.mean(1)
        assert abs(float(means.mean() - wanted) * num**0.5 / float(means.std())) < 5


@pytest.mark.parametrize("kernel", [HMC, NUTS])
def test_kernels_have_the_posteriors_of_all_chains(kernel):
    """Conjugate: N(sum / 6, 1 / 6) for five rows of N(m, 1) under N(0, 1)."""

    def model():
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("rows", 5):
            pyro.sample("x", dist.Normal(m, 1.0))

    x = torch.randn(200, 5) + torch.linspace(-2.0, 2.0, 200)[:, None]
    mcmc = MCMC(kernel(EachChain(model, {"x": x})), 40, 60, num_chains=200, disable_progbar=True)
    mcmc.run()
    z = (mcmc.get_samples()["m"] - x.sum(1)[:, None] / 6.0) * 6.0**0.5
    for values, wanted in ((z, 0.0), (z.square(), 1.0)):
        means = values.mean(1)
        assert abs(float(means.mean() - wanted) * 200**0.5 / float(means.std())) < 5


def test_coordinates_are_flat_only_if_they_are_in_all_chains():
    """A slope that one data set multiplies by zero, and another does not."""

    def model():
        slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0), 1.0).mask(False))
        covariate = pyro.sample("covariate", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(slope * covariate, 1.0))

    covariate = torch.zeros(40)
    with pytest.warns(UserWarning, match="does not depend on some entries of slope"):
        target_of_model(EachChain(model, {"covariate": covariate, "x": covariate}), (), {})
    covariate[-1] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target_of_model(EachChain(model, {"covariate": covariate, "x": covariate}), (), {})


def test_positions_lead_to_values_and_back():
    target = target_of_model(EachChain(groups, group_data()), (), {})
    q = torch.randn(NUM, target.dim)
    torch.testing.assert_close(target.position_of(target.constrain(q)), q)


# --- what is refused


def test_another_number_of_chains():
    each = EachChain(vector_scale, {"x": torch.randn(NUM, 2)})
    mcmc = MCMC(HMC(each), 2, 2, num_chains=4, disable_progbar=True)
    with pytest.raises(ValueError, match="data for 6 chains, and 4 are run: set num_chains=6"):
        mcmc.run()


def masks_by_its_data():
    seen = pyro.sample("seen", dist.Bernoulli(torch.tensor(0.5)))
    precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.poutine.mask(mask=seen.bool()):
        pyro.sample("x", EnergyDistribution(Precision(precision)))


def test_exchange_needs_one_mask():
    data = {"x": torch.randn(2), "seen": torch.tensor([1.0, 0.0])}
    with pytest.raises(ValueError, match="mask differs between chains"):
        exchange_target(EachChain(masks_by_its_data, data), (), {})


BAD = {
    "no model": (lambda: EachChain(3, {"x": torch.zeros(2)}), TypeError, "needs a Pyro model"),
    "no data": (lambda: EachChain(groups, {}), ValueError, "at least one site"),
    "numbers": (lambda: EachChain(groups, {"x": 1.0}), TypeError, "one value per chain"),
    "counts": (
        lambda: EachChain(groups, {"x": torch.zeros(2), "y": torch.zeros(3)}),
        ValueError,
        "as many chains",
    ),
    "name": (lambda: EachChain(vector_scale, {"y": torch.zeros(2)}).check((), {}), ValueError, "y"),
    "shape": (
        lambda: EachChain(vector_scale, {"x": torch.zeros(4, 3)}).check((), {}),
        ValueError,
        r"have shape \(4, 3\), expected \(4, 2\)",
    ),
    "update": (
        lambda: EachChain(groups, {"x": torch.zeros(2)}).update({"x": torch.zeros(3)}),
        ValueError,
        "make a new one",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_each(case):
    make, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        make()
