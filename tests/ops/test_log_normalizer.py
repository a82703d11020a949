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
