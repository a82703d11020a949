"""Plots: what is drawn is what was given, in the right place, and bad input is one sentence."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import to_rgb
from scipy.stats import rankdata

import pyro_ebm as ebm
from pyro_ebm import plots
from pyro_ebm.infer import FitResult

BOUNDS = ((-3.0, 3.0), (-1.0, 2.0))


@pytest.fixture
def ax():
    return plt.figure().subplots()


def drawn(ax):
    """Renders the figure, which is where matplotlib finds most mistakes."""
    ax.figure.canvas.draw()
    return ax


def shifted(point):
    return dist.Normal(torch.tensor(point), 0.3).to_event(1)


def peak_of(ax):
    """Returns the coordinates of the brightest cell of a map."""
    (mesh,) = ax.collections
    values = mesh.get_array().reshape(-1)
    corners = mesh.get_coordinates()
    centres = (corners[1:, 1:] + corners[:-1, :-1]) / 2
    return centres.reshape(-1, 2)[int(np.argmax(values))]


# --- maps of densities


@pytest.mark.parametrize("density", [shifted([2.0, -0.5]), shifted([2.0, -0.5]).log_prob])
def test_map_has_its_peak_where_the_density_has(ax, density):
    assert plots.plot_density(ax, density, BOUNDS, resolution=61) is ax
    np.testing.assert_allclose(peak_of(drawn(ax)), [2.0, -0.5], atol=0.06)


def test_map_is_not_transposed(ax):
    plots.plot_density(ax, shifted([-0.5, 2.0]), BOUNDS, resolution=61)
    assert np.abs(peak_of(ax) - [2.0, -0.5]).max() > 1


def test_map_of_an_ebm_is_its_log_density_and_needs_no_gradient(ax):
    steep = torch.tensor(2.0, requires_grad=True)
    p = ebm.EnergyDistribution(lambda x: steep * x.square().sum(-1), event_shape=(2,))
    plots.plot_density(ax, p, ((-1, 1), (-1, 1)), resolution=3, depth=4.0)
    (mesh,) = ax.collections
    np.testing.assert_allclose(mesh.get_array().reshape(3, 3)[0], [-4.0, -2.0, -4.0])
    assert mesh.get_clim() == (-4.0, 0.0)


def test_map_bears_points_outside_the_support(ax):
    inside = dist.Uniform(-torch.ones(2), torch.ones(2), validate_args=False).to_event(1)
    drawn(plots.plot_density(ax, inside, BOUNDS, resolution=20, colorbar=False))
    assert len(ax.figure.axes) == 1


def test_map_of_one_value_per_coordinate_is_refused(ax):
    with pytest.raises(ValueError, match=r"density returned shape \(400, 2\).*expected \(400,\)"):
        plots.plot_density(ax, dist.Normal(0.0, 1.0).log_prob, BOUNDS, resolution=20)


# --- curves of a fit


def curves(**diagnostics):
    losses = list(np.linspace(3.0, 1.0, 200))
    return FitResult(losses=losses, diagnostics=diagnostics, num_steps=200)


def test_training_curve_is_averaged_around_each_step(ax):
    plots.plot_training(ax, curves(), smooth=21, label="energy")
    raw, average = ax.lines
    assert (raw.get_xdata()[0], raw.get_xdata()[-1]) == (1, 200)
    assert (average.get_xdata()[0], average.get_xdata()[-1]) == (11, 190)
    # the average of a straight line is the line
    np.testing.assert_allclose(average.get_ydata(), raw.get_ydata()[10:190])
    assert [text.get_text() for text in drawn(ax).legend().get_texts()] == ["energy"]


def test_late_diagnostic_is_drawn_at_the_end_of_the_run(ax):
    plots.plot_training(ax, curves(**{"x/bound": [0.5] * 40}), curve="x/bound", smooth=500)
    assert (ax.lines[0].get_xdata()[0], ax.lines[0].get_xdata()[-1]) == (161, 200)
    assert ax.get_ylabel() == "x/bound"


def test_diagnostic_of_one_player_is_drawn_at_its_own_steps(ax):
    result = curves(**{"x/bound": [0.5] * 4})
    result.diagnostic_steps["x/bound"] = [1, 2, 4, 5]
    plots.plot_training(ax, result, curve="x/bound", smooth=1)
    assert list(ax.lines[0].get_xdata()) == [1, 2, 4, 5]


def test_curves_of_a_real_fit_with_its_validation_points(ax):
    def model(x):
        precision = pyro.param("precision", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            p = ebm.EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
            pyro.sample("x", p, obs=x)

    objective = ebm.infer.NCE(noise=dist.Normal(0.0, 1.5))
    data = torch.randn(20)
    options = {"num_steps": 6, "validation": data, "validate_every": 3, "disable_progbar": True}
    result = ebm.fit(model, data, objective, **options)
    plots.plot_training(ax, result)
    assert list(ax.lines[-1].get_xdata()) == [3, 6]
    drawn(plots.plot_training(ax, result, curve="x/log_z"))
    assert len(ax.lines[-1].get_xdata()) == 1


def test_unknown_curve_names_the_known_ones(ax):
    with pytest.raises(KeyError, match=r"no curve 'x/c'.*\['x/log_z'\]"):
        plots.plot_training(ax, curves(**{"x/log_z": [0.0]}), curve="x/c")


# --- histograms of energies


def test_energy_histograms_share_bins_and_integrate_to_one(ax):
    plots.plot_energy_histogram(ax, {"data": torch.randn(300), "draws": torch.randn(5, 40)}, bins=7)
    filled = ax.patches[::2]
    assert [text.get_text() for text in drawn(ax).get_legend().get_texts()] == ["data", "draws"]
    left, right = (patch.get_xy()[:, 0] for patch in filled)
    assert set(left) == set(right)
    for patch in filled:
        x, y = patch.get_xy().T
        area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
        assert area == pytest.approx(1.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_energies_that_are_not_finite_are_named(ax, values):
    with pytest.raises(ValueError, match="energies of 'draws' must be finite"):
        plots.plot_energy_histogram(ax, {"data": [0.0], "draws": values})


# --- rank plots


def test_ranks_are_those_of_an_independent_implementation():
    draws = np.random.default_rng(0).integers(0, 9, size=(3, 40)).astype(float)
    expected = rankdata(draws).reshape(draws.shape)
    np.testing.assert_array_equal(plots._ranks(draws), expected)


def heights(ax, chains):
    return np.array([bar.get_height() for bar in ax.patches]).reshape(chains, -1)


def test_chains_that_agree_are_flat_and_a_shifted_chain_is_not():
    draws = torch.randn(4, 1000)
    agree = heights(plots.plot_rank(plt.figure().subplots(), draws), 4)
    draws[0] += 1.0
    differ = heights(drawn(plots.plot_rank(plt.figure().subplots(), draws)), 4)
    # 50 draws a bin: binomial sd 7, six of them is .84 of the expected height
    assert np.ptp(agree) / agree.mean() < 1.7
    assert np.ptp(differ) / differ.mean() > 2.0


def test_rows_of_a_rank_plot_do_not_overlap(ax):
    apart = torch.arange(4.0)[:, None] + 0.01 * torch.randn(4, 200)
    plots.plot_rank(ax, apart)
    assert 0.5 < heights(ax, 4).max() < 1.0


def test_rank_plot_of_a_vector_is_refused(ax):
    with pytest.raises(ValueError, match=r"one scalar.*got \(4, 10, 2\)"):
        plots.plot_rank(ax, torch.randn(4, 10, 2))


# --- images


def test_images_are_tiled_row_by_row_with_gaps(ax):
    plots.plot_images(ax, torch.arange(1.0, 6.0).reshape(5, 1, 1).expand(5, 2, 3), (2, 3))
    sheet = drawn(ax).images[0].get_array()
    assert sheet.shape == (5, 11)
    assert [sheet[0, 0], sheet[1, 6], sheet[0, 8], sheet[3, 0], sheet[4, 4]] == [1, 2, 3, 4, 5]
    assert sheet.mask[2].all()
    assert sheet.mask[:, 3].all()
    assert sheet.mask[3:, 8:].all()  # the place of the sixth image


def test_images_default_to_a_square_and_surplus_is_left_out(ax):
    plots.plot_images(ax, torch.rand(9, 8, 8))
    assert ax.images[0].get_array().shape == (26, 26)
    plots.plot_images(ax, torch.rand(9, 8, 8), (1, 2))
    assert ax.images[1].get_array().shape == (8, 17)


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 8), (4, 1, 8, 8)])
def test_images_of_another_shape_are_refused(ax, shape):
    with pytest.raises(ValueError, match=r"images must have shape \(N, height, width\)"):
        plots.plot_images(ax, torch.rand(shape))


# --- colours


def luminance(color):
    return float(np.dot([0.2126, 0.7152, 0.0722], np.array(to_rgb(color)) ** 2.2))


def test_colours_are_distinct():
    assert len(set(plots.PALETTE)) == len(plots.PALETTE) == 7
    assert abs(luminance(plots.PALETTE[0]) - luminance(plots.PALETTE[4])) > 0.2
