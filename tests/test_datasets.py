"""Generated points have the geometry they promise; digits keep their split."""

from __future__ import annotations

import math
import sys

import pytest
import sklearn.datasets
import torch

from pyro_ebm import datasets

GENERATORS = {
    "two_moons": datasets.two_moons,
    "ring": datasets.ring,
    "eight_gaussians": datasets.eight_gaussians,
    "grid_of_gaussians": datasets.grid_of_gaussians,
    "two_spirals": datasets.two_spirals,
    "pinwheel": datasets.pinwheel,
    "checkerboard": datasets.checkerboard,
}


def z_score(values, mean):
    values = values.double()
    return ((values.mean(0) - mean) / (values.std(0) / len(values) ** 0.5)).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", GENERATORS)
def test_shape_dtype_and_size(name, dtype):
    torch.set_default_dtype(dtype)
    x = GENERATORS[name](500)
    assert x.shape == (500, 2)
    assert x.dtype == dtype
    assert 1.0 < x.abs().max() < 8.0


@pytest.mark.parametrize("name", GENERATORS)
def test_randomness_is_the_global_one_or_the_one_given(name):
    make = GENERATORS[name]
    torch.manual_seed(3)
    first = make(20)
    torch.manual_seed(3)
    assert torch.equal(first, make(20))
    assert not torch.equal(first, make(20))
    torch.manual_seed(3)
    seeded = make(20, generator=torch.Generator().manual_seed(3))
    assert torch.equal(seeded, make(20, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(first, make(20))  # the global state did not move


@pytest.mark.parametrize("name", ["ring", "eight_gaussians", "grid_of_gaussians", "checkerboard"])
def test_symmetric_sets_are_centred(name):
    x = GENERATORS[name](20_000)
    assert z_score(x, 0.0) < 5
    assert z_score(x + 0.2, 0.0) > 5


def test_moons_lie_on_two_arcs():
    x = datasets.two_moons(1000, noise=0.0)
    centre = torch.tensor([0.5, 0.25])
    upper, lower = x + centre, -x + centre
    on_upper = ((upper.norm(dim=-1) - 1).abs() < 1e-5) & (upper[:, 1] > -1e-5)
    on_lower = ((lower.norm(dim=-1) - 1).abs() < 1e-5) & (lower[:, 1] > -1e-5)
    assert (on_upper | on_lower).all()
    assert 400 < on_upper.sum() < 600


def test_rings_lie_on_their_circles():
    x = datasets.ring(3000, radii=(1.0, 3), noise=0.0)
    radius = x.norm(dim=-1)
    assert torch.minimum((radius - 1).abs(), (radius - 3).abs()).max() < 1e-5
    assert z_score((radius < 2).double(), 0.5) < 5


def test_noise_has_its_standard_deviation():
    x = datasets.grid_of_gaussians(20_000, side=1, std=0.3)
    assert z_score(x.square(), 0.09) < 5
    assert z_score(x.square(), 0.08) > 5


def test_modes_follow_their_weights():
    weights = torch.arange(1.0, 26.0)
    x = datasets.grid_of_gaussians(20_000, std=0.01, weights=weights.tolist())
    index = ((x / 2).round() + 2).long()
    hits = torch.nn.functional.one_hot(5 * index[:, 0] + index[:, 1], 25).double()
    assert z_score(hits, weights / weights.sum()) < 5
    assert z_score(hits, torch.full((25,), 0.04)) > 5
    eight = datasets.eight_gaussians(200, std=0.0, weights=[0, 0, 1, 0, 0, 0, 0, 0])
    torch.testing.assert_close(eight, torch.tensor([[0.0, 2.0]]).expand(200, 2))


def test_spiral_arms_are_each_others_mirror_image():
    x = datasets.two_spirals(2000, noise=0.0, turns=1.5)
    radius = x.norm(dim=-1)
    angle = torch.atan2(x[:, 1], x[:, 0]) - 2 * math.pi * 1.5 * radius / 3.0
    # On an arm the angle less the winding is 0, on the other one pi.
    assert (2 * angle).sin().abs().max() < 1e-3
    assert z_score((angle.cos() > 0).double(), 0.5) < 5


def test_pinwheel_has_its_arms():
    x = datasets.pinwheel(3000, num_arms=5, radial_std=0.1, tangential_std=0.02, rate=0.0)
    phase = 5 * torch.atan2(x[:, 1], x[:, 0])
    assert phase.cos().min() > 0.5
    assert x.norm(dim=-1).mean() == pytest.approx(2.0, abs=0.05)


def test_checkerboard_is_uniform_on_the_dark_squares():
    x = datasets.checkerboard(20_000)
    squares = x.floor()
    assert (squares.sum(-1) % 2 == 0).all()
    counts = torch.unique(squares, dim=0, return_counts=True)[1]
    assert len(counts) == 8
    assert (counts - 2500).abs().max() < 5 * 2500**0.5
    assert z_score((x - squares).square(), 1 / 3) < 5


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="side must be even.*got 3"):
        datasets.checkerboard(10, side=3)
    with pytest.raises(ValueError, match="one value per mode, 25, got 3"):
        datasets.grid_of_gaussians(10, weights=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="one value per mode, 8, got 3"):
        datasets.eight_gaussians(10, weights=[1.0, 2.0, 3.0])


def test_digits_are_split_once_and_for_all():
    data = datasets.digits()
    sizes = [len(part) for part in data]
    assert sizes == [1197, 300, 300] * 2
    assert data.train.shape[1:] == (8, 8)
    assert data.train.dtype == torch.get_default_dtype()
    assert data.train.min() == 0.0
    assert data.train.max() == 1.0
    assert set(data.test_labels.tolist()) == set(range(10))
    assert torch.equal(data.test, datasets.digits().test)
    assert not torch.equal(data.test, datasets.digits(seed=1).test)
    everything = torch.cat([data.train, data.valid, data.test]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no image is in two parts


def test_digits_keep_their_labels():
    source = sklearn.datasets.load_digits()
    labels = {
        image.tobytes(): label for image, label in zip(source.images, source.target, strict=True)
    }
    data = datasets.digits(seed=3)
    for images, given in (
        (data.train, data.train_labels),
        (data.valid, data.valid_labels),
        (data.test, data.test_labels),
    ):
        levels = (16 * images).double().numpy()
        assert [labels[image.tobytes()] for image in levels] == given.tolist()


def test_digits_ignore_the_global_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    datasets.digits(dequantize=True)
    assert torch.equal(before, torch.get_rng_state())


def test_dequantized_digits_round_back():
    levels = (16 * datasets.digits().train).round()
    noisy = datasets.digits(dequantize=True).train
    assert noisy.min() >= 0.0
    assert noisy.max() <= 1.0
    remainder = (17 * noisy.double()) - levels
    assert remainder.min() > -1e-5
    assert remainder.max() < 1 + 1e-5
    assert z_score(remainder.reshape(-1), 0.5) < 5


def test_digits_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        datasets.digits()
