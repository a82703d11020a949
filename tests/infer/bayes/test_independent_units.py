"""Rows of several sites by the units they share, and J from these units in closed form."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm.distributions import EnergyDistribution, unwrap
from pyro_ebm.infer.bayes.calibration import calibration_of
from pyro_ebm.infer.bayes.generalized_bayes import GeneralizedBayes
from pyro_ebm.infer.bayes.independent_units import units_of
from pyro_ebm.infer.bayes.loss_of_model import ModelLoss
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.mcmc import HMC
from pyro_ebm.poutine import surrogate

PRIOR = 1e-4  # its precision


def loss_of(model, *args):
    scored = GeneralizedBayes(ScoreMatching())
    target = HMC(surrogate(model, scored)).bind(*args)
    return ModelLoss(target, model, scored, (args, {}))


def centre():
    return pyro.sample("m", dist.Normal(torch.tensor(0.0), PRIOR**-0.5))


def around(m, name, x):
    """N(m, 1): score matching has the loss (x - m)^2 / 2 - 1, whose gradient is m - x."""
    law = EnergyDistribution(lambda v: 0.5 * (v - m) ** 2, event_shape=())
    pyro.sample(name, law, obs=x)


def side_by_side(x, y):
    m = centre()
    with pyro.plate("rows", len(x)):
        around(m, "x", x)
        around(m, "y", y)


def apart(x, y):
    m = centre()
    for name, value in (("x", x), ("y", y)):
        with pyro.plate(f"rows of {name}", len(value)):
            around(m, name, value)


def nested(x, y):
    """y has three columns in every row of x."""
    m = centre()
    with pyro.plate("rows", len(x), dim=-1):
        around(m, "x", x)
        with pyro.plate("columns", len(y), dim=-2):
            around(m, "y", y)


def crosswise(x, y, z):
    m = centre()
    with pyro.plate("rows", len(x), dim=-1):
        around(m, "x", x)
        with pyro.plate("columns", len(y), dim=-2):
            around(m, "z", z)
    with pyro.plate("columns again", len(y), dim=-2):
        around(m, "y", y[:, None])


def crossed(x, y, z):
    m = centre()
    rows, columns = pyro.plate("rows", len(x), dim=-1), pyro.plate("columns", len(y), dim=-2)
    with rows:
        around(m, "x", x)
    with columns:
        around(m, "y", y[:, None])
    with rows, columns:
        around(m, "z", z)


def one_by_one(x, y):
    """A plate as a loop: the sites of one turn are a unit."""
    m = centre()
    for i in pyro.plate("rows", len(x)):
        around(m, f"x {i}", x[i])
        around(m, f"y {i}", y[i])


def with_lattice(x, y):
    """A site of a single row beside many."""
    m = centre()
    with pyro.plate("rows", len(x)):
        around(m, "x", x)
    around(m, "y", y[0])


def variance(loss):
    """What calibration makes of the posterior's: it was 1 / H."""
    found = calibration_of(loss, choice="sandwich")
    return found.factor.item() ** 2 / found.hessian.item()


def by_hand(size, sums):
    """(J + prior) / H^2 with J from independent components."""
    j = sum(len(s) * s.var() for s in sums)
    return float((j + PRIOR) / (size + PRIOR) ** 2)


X = torch.linspace(-1.0, 1.5, 50, dtype=torch.float64)
Y = torch.linspace(2.0, -1.0, 50, dtype=torch.float64) ** 2
TABLE = torch.stack([X, 2 * X, Y])
CASES = {
    "the same rows twice": (side_by_side, (X, X), [2 * X]),
    "rows of two sites": (side_by_side, (X, Y), [X + Y]),
    "sites apart": (apart, (X, Y[:30]), [X, Y[:30]]),
    "nested": (nested, (X, TABLE), [X + TABLE.sum(0)]),
    "a loop": (one_by_one, (X[:20], Y[:20]), [X[:20] + Y[:20]]),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_count_by_their_unit(case):
    """Pooled, rows of one unit would count as independent, and means of sites as a spread."""
    model, data, sums = CASES[case]
    size = sum(value.numel() for value in data)
    assert variance(loss_of(model, *data)) == pytest.approx(by_hand(size, sums), rel=1e-8)


def test_masked_rows_are_no_units():
    def model(x, y, counts):
        m = centre()
        with pyro.plate("rows", len(x)), poutine.mask(mask=counts):
            around(m, "x", x)
            around(m, "y", y)

    counts = torch.arange(50) < 30
    loss = loss_of(model, X, Y, counts)
    assert loss.units.num_independent == 30
    assert variance(loss) == pytest.approx(by_hand(60, [(X + Y)[:30]]), rel=1e-8)


def test_sites_that_share_plates_crosswise_have_no_units():
    data = (X, Y[:3], TABLE)
    loss = loss_of(crossed, *data)
    with pytest.raises(ValueError, match=r"share plates crosswise.*calibration='simulation'"):
        calibration_of(loss, choice="sandwich")
    found = calibration_of(loss, num_simulations=20)
    assert found.kind == "simulation"
    assert "share plates crosswise" in found.reasons[0]
    apart_again = loss_of(crosswise, *data)  # the same shapes, and no plate in common
    assert apart_again.units is not None


def test_a_site_of_one_row_has_no_covariance():
    loss = loss_of(with_lattice, X, Y)
    with pytest.raises(ValueError, match="those of a site, are one dependent observation"):
        calibration_of(loss, choice="sandwich")


def test_dims_that_are_events_do_not_move_plates():
    """Three columns by to_event(1) in 50 rows: units are the rows."""

    def model(x, y):
        m = centre()
        with pyro.plate("rows", len(x)):
            around(m, "x", x)
            law = EnergyDistribution(lambda v: 0.5 * (v - m) ** 2, event_shape=())
            pyro.sample("y", law.expand([3]).to_event(1), obs=y)

    nodes = poutine.trace(model).get_trace(X, TABLE.T).nodes
    sites = {name: nodes[name] for name in ("x", "y")}
    shapes = {name: unwrap(site["fn"]).batch_shape for name, site in sites.items()}
    units = units_of(sites, shapes)
    assert units.num_independent == 50
    expected = torch.cat([torch.arange(50), torch.arange(50).repeat_interleave(3)])
    assert torch.equal(units.of_rows, expected)
