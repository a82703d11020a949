"""Every public objective is in a cross-method test, or is named here with what it does instead."""

from __future__ import annotations

import inspect

import pytest
import test_cross_method as gaussian
import test_cross_method_spins as spins

import pyro_ebm.infer
from pyro_ebm.infer import MMD, DonskerVaradhan, KernelKALE, Objective, WassersteinCritic

BESIDE_THE_TABLES = {
    DonskerVaradhan: gaussian.test_donsker_varadhan_is_kale_at_its_best_log_z,
}
LEARN_NO_LAW = {
    KernelKALE: "trains the law that draws; the energy takes no part (test_kernel_kale)",
    MMD: "trains the law that draws; the energy takes no part (test_mmd)",
    WassersteinCritic: "its energy is no log density; a penalty sets the scale (test_wasserstein)",
}


def public_objectives():
    named = [getattr(pyro_ebm.infer, name) for name in pyro_ebm.infer.__all__]
    kinds = [kind for kind in named if inspect.isclass(kind) and issubclass(kind, Objective)]
    return {kind for kind in kinds if not inspect.isabstract(kind)}


def in_tables():
    made = [make() for table in (gaussian, spins) for make, _ in table.OBJECTIVES.values()]
    return {type(objective) for objective in made if objective is not None}


def missing(objectives):
    return {kind.__name__ for kind in objectives - in_tables() - set(BESIDE_THE_TABLES)}


def test_every_objective_is_compared_or_says_why_not():
    assert missing(public_objectives()) == {kind.__name__ for kind in LEARN_NO_LAW}


def test_a_new_objective_would_be_missed():
    class Another(gaussian.ScoreMatching):
        """Public, and in neither table."""

    assert "Another" in missing(public_objectives() | {Another})


@pytest.mark.parametrize("kind", LEARN_NO_LAW)
def test_what_learns_no_law_says_so(kind):
    """The reasons, by what the classes say of themselves."""
    is_critic = kind is WassersteinCritic and not kind.is_held_out_criterion
    assert is_critic or not kind.trains_energy
