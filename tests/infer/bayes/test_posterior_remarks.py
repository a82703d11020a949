"""What a posterior says of many sites at once, of mixtures and latent EBMs, and how it is used."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints as C

from pyro_ebm import EnergyDistribution
from pyro_ebm.chains import Record
from pyro_ebm.energies import Ising
from pyro_ebm.errors import ConditionalEnergyError
from pyro_ebm.infer.bayes.data_structure import data_structure
from pyro_ebm.infer.bayes.generalized_bayes import generalized_posterior
from pyro_ebm.infer.bayes.nce_posterior import nce_posterior
from pyro_ebm.infer.bayes.posterior import posterior
from pyro_ebm.infer.bayes.posterior_remarks import mixing_remarks
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.ops.constraints import spins

F64 = torch.float64
NUM_STATES = 7
COUNTS = torch.tensor([0.0, 0, 0, 3, 2, 0, 4, 1, 0, 2], dtype=F64)
FEW = {"num_samples": 20, "warmup_steps": 20, "num_chains": 4}


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(2)
    torch.set_default_dtype(F64)


def counts(rate):
    """Numbers from 0 to 6."""
    support = C.integer_interval(0, NUM_STATES - 1)
    return EnergyDistribution(lambda v: -rate * v, support=support, event_shape=())


def parameters():
    gate = pyro.sample("gate", dist.Uniform(torch.tensor(0.0), 1.0))
    return gate, pyro.sample("rate", dist.Normal(torch.tensor(0.0), 1.0))


def with_zeros(y):
    gate, rate = parameters()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.ZeroInflatedDistribution(counts(rate), gate=gate), obs=y)


def with_zeros_as_advised(y):
    gate, rate = parameters()
    with pyro.plate("rows", len(y)):
        absent = pyro.sample("absent", dist.Bernoulli(gate), infer={"enumerate": "parallel"})
        pyro.sample("y", counts(rate).mask(absent == 0), obs=y)
        pyro.sample("zero", dist.Delta(torch.zeros(())).mask(absent == 1), obs=y)


def test_a_mixture_with_an_ebm_is_told_what_works():
    with pytest.raises(
        ValueError, match=r"'y': ZeroInflatedDistribution adds.*mask\(absent == 0\)"
    ):
        posterior(with_zeros, COUNTS, **FEW)


def test_what_works_has_the_posterior_of_the_mixture():
    """Means over a grid; five standard errors of the chains' means are under a third of an sd."""
    found = posterior(with_zeros_as_advised, COUNTS, num_samples=60, warmup_steps=60, num_chains=32)
    gate = torch.linspace(0.0025, 0.9975, 200)[:, None, None]
    rate = torch.linspace(-4.0, 4.0, 401)[:, None]
    p = (1 - gate) * (rate * torch.arange(NUM_STATES)).softmax(-1)
    p = torch.cat([p[..., :1] + gate, p[..., 1:]], -1)
    log_p = p[..., COUNTS.long()].log().sum(-1) - 0.5 * rate[:, 0].square()
    weights = log_p.flatten().softmax(0).reshape(log_p.shape)
    wanted = {"gate": weights.sum(1) @ gate[:, 0, 0], "rate": weights.sum(0) @ rate[:, 0]}
    for name, mean in wanted.items():
        draws = torch.as_tensor(found.record.draws[name])
        error = draws.mean(1).std() / 32**0.5
        assert float(5 * error / draws.std()) < 1 / 3
        assert abs(float((draws.mean() - mean) / error)) < 5


def test_latent_ebms_are_looked_at_in_silence():
    """How short chains draw them does not matter to what is said: warnings are errors here."""

    def model(x):
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 2.0))
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 2.0))
        law = EnergyDistribution(lambda z: -(a * z + b * z**2), dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    with pytest.raises(ValueError, match=r"sites \['z'\] are latent"):
        posterior(model, torch.zeros(60), **FEW)


def loop(ys):
    rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0), 1.0))
    for i in pyro.plate("turns", len(ys)):
        with pyro.plate(f"rows_{i}", len(ys[i])):
            pyro.sample(f"y_{i}", counts(rate), obs=ys[i])


@pytest.mark.parametrize(
    ("turns", "names"),
    [
        (1, "site 'y_0'"),
        (2, "sites 'y_0', 'y_1', each,"),
        (5, "sites 'y_0', ..., 'y_4' (5), each,"),
    ],
)
def test_turns_of_a_loop_are_spoken_of_once(turns, names):
    found = posterior(loop, [COUNTS] * turns, **FEW)
    assert found.reasons == (
        f"the data of {names} are independent rows (10) of one law.",
        f"log Z of {names} is a sum over 7 states.",
    )


def test_draws_are_for_predictive():
    found = posterior(loop, [COUNTS], **FEW)
    draws = found.get_samples()
    assert draws["rate"].tolist() == found.record.draws["rate"].reshape(-1).tolist()
    seen = pyro.infer.Predictive(loop, draws, return_sites=["rate", "y_0"])([COUNTS])
    assert seen["rate"].shape[0] == seen["y_0"].shape[0] == 80


# --- models and data without a way


def hidden_field(y):
    k = pyro.sample("k", dist.Normal(torch.tensor(0.0), 1.0))
    s = pyro.sample("s", EnergyDistribution(Ising(k, (3, 3))))
    pyro.sample("y", dist.Normal(s, 1.0).to_event(2), obs=y)


def hidden_spin(y):
    k = pyro.sample("k", dist.Normal(torch.tensor(0.0), 1.0))
    law = EnergyDistribution(
        lambda s: -k * s, support=spins, event_shape=(), log_normalizer=lambda: (2 * k.cosh()).log()
    )
    s = pyro.sample("s", law, infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(s, 1.0), obs=y)


def test_hidden_fields_are_not_for_any_kernel():
    """Also where log Z is known; a spin of its own is summed out by Pyro."""
    with pytest.raises(ValueError, match=r"\['s'\] are latent where no gradient .* sum them out"):
        data_structure(hidden_field, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="any kernel samples it"):
        data_structure(hidden_spin, torch.tensor(0.0))


def precision_of_each(x, *, centred):
    spread = pyro.sample("spread", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("groups", x.shape[1]):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), spread if centred else 1.0))
        law = EnergyDistribution(
            lambda t: 0.05 * (z if centred else spread * z).exp() * (t**4).sum(-1), event_shape=(4,)
        )
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law, obs=x)


def test_groups_with_one_log_z_are_told_what_posteriors_there_are():
    with pytest.raises(ConditionalEnergyError, match="use generalized_posterior, or mcmc.Exchange"):
        posterior(precision_of_each, torch.randn(5, 3, 4), centred=True, method="nce")


@pytest.mark.slow
def test_scales_that_draw_groups_together_have_another_form():
    x = torch.randn(12, 4, 4)
    sizes = {"num_samples": 4, "warmup_steps": 4, "num_chains": 2, "num_simulations": 60}
    with pytest.raises(ValueError, match=r"write them as loc \+ scale \* z, .*generalized_post"):
        generalized_posterior(precision_of_each, x, centred=True, loss=ScoreMatching(), **sizes)
    for options in ({"centred": False}, {"centred": True, "calibration": "none"}):
        generalized_posterior(precision_of_each, x, loss=ScoreMatching(), **sizes, **options)


@pytest.mark.parametrize("way", [posterior, nce_posterior])
def test_no_data_are_no_rows(way):
    with pytest.raises(ValueError, match="plate of the model has no rows: are the data empty"):
        way(precision_of_each, torch.zeros(0, 3, 4), centred=True)


def test_divisions_of_the_model_stay_what_they_are():
    with pytest.raises(ZeroDivisionError, match="division"):
        data_structure(lambda x: x / (1 // 0), torch.zeros(3))


def test_one_chain_is_not_asked_for_more_draws():
    record = Record({"a": torch.randn(1, 300).numpy()})
    assert mixing_remarks(Posterior(record, "exact log Z")) == (
        "one chain does not tell whether it has mixed: use more num_chains.",
    )
