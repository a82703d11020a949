"""A log Z estimate knows when the parameters it was made at have moved."""

import copy
import io
import pickle

import pytest
import torch

from pyro_ebm.ops.log_normalizer import LogNormalizer


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.ones(3))


def estimate(*parameters):
    return LogNormalizer(torch.tensor(0.5), torch.tensor(0.1), "ais", parameters=parameters)


def test_plain_number_becomes_a_tensor_and_never_goes_stale():
    z = LogNormalizer(1.5)
    assert isinstance(z.value, torch.Tensor)
    assert float(z.value) == 1.5
    assert not z.is_stale


def test_optimizer_step_makes_it_stale(weight):
    z = estimate(weight)
    assert not z.is_stale
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.sum().backward()
    assert not z.is_stale
    optimizer.step()
    assert z.is_stale


def test_one_moved_parameter_among_many_is_enough(weight):
    others = [torch.zeros(2) for _ in range(3)]
    z = estimate(*others, weight)
    with torch.no_grad():
        weight.mul_(2.0)
    assert z.is_stale


def test_loading_a_state_dict_makes_it_stale():
    net = torch.nn.Linear(2, 1)
    z = estimate(*net.parameters())
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    assert z.is_stale


def test_data_assignment_is_invisible(weight):
    z = estimate(weight)
    weight.data = torch.zeros(3)
    assert not z.is_stale


def test_parameters_may_be_a_generator():
    net = torch.nn.Linear(2, 1)
    z = LogNormalizer(torch.tensor(0.0), parameters=(p for p in net.parameters()))
    assert len(z.parameters) == 2
    with torch.no_grad():
        net.bias.add_(1.0)
    assert z.is_stale


def test_inference_tensors_have_no_version_and_count_as_fresh():
    with torch.inference_mode():
        theta = torch.ones(2)
    assert not estimate(theta).is_stale


def deepcopied(z):
    return copy.deepcopy(z)


def pickled(z):
    return pickle.loads(pickle.dumps(z))


def torch_saved(z):
    buffer = io.BytesIO()
    torch.save(z, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [deepcopied, pickled, torch_saved]


@pytest.mark.parametrize("duplicate", COPIES)
def test_copy_of_a_fresh_estimate_is_fresh_and_watches_its_own_parameters(duplicate, weight):
    with torch.no_grad():
        weight.add_(1.0)  # a version above zero, which no copy inherits
    z = estimate(weight)
    twin = duplicate(z)
    assert not twin.is_stale
    assert torch.equal(twin.value, z.value)
    assert twin.method == "ais"
    with torch.no_grad():
        twin.parameters[0].add_(1.0)
    assert twin.is_stale
    assert not z.is_stale


@pytest.mark.parametrize("duplicate", COPIES)
def test_copy_of_a_stale_estimate_stays_stale(duplicate, weight):
    z = estimate(weight)
    with torch.no_grad():
        weight.add_(1.0)
    twin = duplicate(z)
    assert twin.is_stale
    assert duplicate(twin).is_stale


def test_deepcopy_beside_its_energy_keeps_watching_the_copied_weights():
    net = torch.nn.Linear(2, 1)
    pair = {"net": net, "z": estimate(*net.parameters())}
    twin = copy.deepcopy(pair)
    assert twin["z"].parameters[0] is twin["net"].weight
    with torch.no_grad():
        twin["net"].weight.add_(1.0)
    assert twin["z"].is_stale
    assert not pair["z"].is_stale


def test_fields_cannot_be_reassigned():
    with pytest.raises(AttributeError):
        LogNormalizer(torch.tensor(0.0)).value = torch.tensor(1.0)


# --- what is said of an error bar


def judged(**options):
    return LogNormalizer(torch.tensor(1.0), torch.tensor(0.1), "ais", **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ess": 99.0}, "effective sample size 99 < 100"),
        ({"khat": 0.71}, "Pareto tail index 0.71 > 0.70"),
        ({"khat": 0.55, "num_samples": 100}, "Pareto tail index 0.55 > 0.50"),
        ({"khat": float("nan")}, "Pareto tail index nan"),
        ({"remarks": ("the runs differ",)}, "the runs differ"),
    ],
)
def test_what_speaks_against_an_estimate(options, sentence):
    z = judged(**options)
    assert not z.is_trusted
    assert sentence in z.doubts[0]
    assert f"not to be trusted: {sentence}" in str(z)


def test_what_speaks_for_an_estimate():
    z = judged(ess=100.0, khat=0.49, num_samples=100, start="base")
    assert z.is_trusted
    assert str(z) == "log Z = 1.00 ± 0.10 nats (ais, from the base, ESS 100 of 100)"
    low, high = z.interval()
    assert float(low) == pytest.approx(1.0 - 0.196)
    assert float(high) == pytest.approx(1.0 + 0.196)


def test_no_interval_where_there_are_doubts():
    with pytest.raises(ValueError, match="no interval can be given: effective sample size 5 < 100"):
        judged(ess=5.0).interval()
    with pytest.raises(ValueError, match="has no standard error, hence no interval"):
        LogNormalizer(torch.tensor(1.0), method="quadrature").interval()


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (1234.5678, 0.00123, "1234.5678 ± 0.0012"),
        (1.0, 12.0, "1 ± 12"),
        (-0.346573590, 0.0, "-0.34657359"),
        (2.5, None, "2.5"),
    ],
)
def test_figures(value, stderr, text):
    error = None if stderr is None else torch.tensor(stderr)
    z = LogNormalizer(torch.tensor(value, dtype=torch.float64), error, "m")
    assert str(z) == f"log Z = {text} nats (m)"


def test_many_values_are_told_by_their_range():
    z = LogNormalizer(torch.tensor([1.0, 2.0, 5.0]), torch.zeros(3), "exact")
    assert str(z) == "log Z = 1 to 5 (shape (3,)) nats (exact)"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_trusted(value):
    """Neither is a batch of which one value is not."""
    for values in (torch.tensor(value), torch.tensor([0.0, value])):
        estimate = LogNormalizer(values, torch.zeros_like(values), "closed form")
        assert not estimate.is_trusted
        assert str(estimate).endswith("not to be trusted: it is not finite")
