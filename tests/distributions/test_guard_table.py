"""Every row of the guard's table holds in stock Pyro, and every error prevents a wrong number."""

from __future__ import annotations

from pathlib import Path

import guard_table as table
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer import autoguide
from pyro.optim import Adam

from pyro_ebm import MissingNormalizerError, check_model
from pyro_ebm.distributions import guard_schedule

DOCS = Path(__file__).parents[2] / "docs" / "guard.rst"


ROWS = table.ROWS
X = table.models.X


def positions(*results):
    """Returns the models that have a row with one of these results."""
    return list(dict.fromkeys(row.position for row in ROWS if row.result in results))


@pytest.fixture(autouse=True)
def first_use(monkeypatch):
    """No earlier row counts as a use of the energies of this one."""
    monkeypatch.setattr(guard_schedule, "_calls", {})


# Pyro and torch warn of slow, deprecated or odd inferences; that they are run is the point here.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.id, marks=pytest.mark.slow if row.id in table.SLOW else ())
        for row in ROWS
    ],
)
def test_row(row):
    if row.result == "raises":
        with pytest.raises(MissingNormalizerError):
            row.run()
    else:
        row.run()


# --- with the guard switched off, what raises would be wrong


BY_VALUE = {"enumerated_mixture"}


@pytest.mark.parametrize("position", sorted({*positions("raises")} - BY_VALUE))
def test_what_raises_has_a_wrong_gradient(position):
    assert table.wrongness(position) > 0.1


def test_an_enumerated_mixture_weighs_its_components_wrongly():
    """Where no latent has a gradient the weights themselves are wrong, by the ratio of the Z."""
    setup = table.models.enumerated_mixture()
    held = {"loc": torch.tensor(0.0)}

    def weight(k):
        values = held | {"k": torch.full((50,), float(k))}
        with pyro.settings.context(ebm_missing_normalizer="ignore"):
            return table.log_density(setup.model, setup, values)

    scales = table.models._SCALES
    normal = dist.Normal(0.0, scales).log_prob(X.unsqueeze(-1)).sum(0)
    error = (weight(1) - weight(0)) - (normal[1] - normal[0])
    assert error == pytest.approx(50 * float((scales[1] / scales[0]).log()), rel=1e-4)


RIGHT = (
    "exact_gaussian",
    "exact_quartic",
    "covering_tensor",
    "covering_callable",
    "param_exact",
    "function_of_latent",
    "observed_parent",
    "gebm_fixed",
    "factor_with_coupling",
    "factor_meant_jointly",
)


@pytest.mark.parametrize("position", RIGHT)
def test_what_is_silent_has_the_right_gradient(position):
    """The negative twin of the measure: it finds nothing where there is nothing to find."""
    assert table.wrongness(position) < 1e-4


S = 0.5 * float((X**2).sum())  # the log likelihood is 25 log(theta) - S theta


def test_nuts_without_the_guard_returns_the_wrong_posterior():
    """Gamma(2, 1) times the likelihood is Gamma(27, 1 + S); without log Z it is Gamma(2, 1 + S)."""
    setup = table.models.closure()
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        mcmc = infer.MCMC(infer.NUTS(setup.model), 300, 100, disable_progbar=True)
        mcmc.run(*setup.args)
    wrong, right = 2.0 / (1.0 + S), 27.0 / (1.0 + S)
    error = wrong / 2.0**0.5 / 50**0.5  # at least 50 effective draws of 300
    mean = float(mcmc.get_samples()["theta"].mean())
    assert abs(mean - wrong) < 5.0 * error
    assert abs(mean - right) > 50.0 * error


def test_map_without_the_guard_is_the_wrong_mode():
    """The mode is 26 / (1 + S); without log Z it is 1 / (1 + S)."""
    setup = table.models.closure()
    start = autoguide.initialization.init_to_value(values={"theta": torch.tensor(1.0)})
    guide = autoguide.AutoDelta(setup.model, init_loc_fn=start)
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        svi = infer.SVI(setup.model, guide, Adam({"lr": 0.1}), infer.Trace_ELBO())
        for _ in range(200):
            svi.step(*setup.args)
    assert float(guide.median()["theta"]) == pytest.approx(1.0 / (1.0 + S), rel=0.02)


def test_maximum_likelihood_without_the_guard_runs_away():
    """The maximum is at 25 / S, about 3; without log Z the energy is pushed to zero everywhere."""
    setup = table.models.param()
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        svi = infer.SVI(setup.model, setup.guide, Adam({"lr": 0.1}), infer.Trace_ELBO())
        for _ in range(200):
            svi.step(*setup.args)
    assert float(pyro.param("a").detach()) < 0.1


# --- the structural check over the same models


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("position", positions("raises", "silent", "not caught"))
def test_check_model_names_the_latents_that_log_z_does_not_cover(position):
    setup = getattr(table.models, position)()
    if not setup.uncovered:
        assert check_model(setup.model, *setup.args).is_sound
        return
    with pytest.raises(MissingNormalizerError, match=", ".join(map(repr, setup.uncovered))):
        check_model(setup.model, *setup.args)


def test_check_model_catches_what_it_says_it_does():
    promised = {row.position for row in ROWS if "check_model" in row.why}
    caught = {name for name in promised if getattr(table.models, name)().uncovered}
    assert promised == caught
    assert len(promised) >= 4


# --- the table itself


def test_table_is_complete():
    assert len(ROWS) >= 60
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert {row.inference for row in ROWS} == set(table.INFERENCES)
    assert set(RIGHT) <= set(positions("silent"))
    assert all(row.case.endswith(".") for row in ROWS)
    assert {row.id for row in ROWS} >= table.SLOW


def test_docs_show_the_table_as_it_is():
    text = DOCS.read_text(encoding="utf-8")
    assert [row.id for row in ROWS if f"* - {row.id}\n" not in text] == []
    assert table.as_rst() in text, "python tests/distributions/guard_table.py prints the table"
