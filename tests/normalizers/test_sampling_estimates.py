"""Importance sampling, bridge, annealing and SMC: unbiased, with errors that cover."""

import math
import re

import pyro.distributions as dist
import pytest
import torch
from laws_with_log_z import check_estimates, draws_of_tilted, three_modes, tilted

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MCMC, SMC, RandomWalk
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.normalizers import (
    ais,
    bridge,
    gauss_hermite,
    importance,
    nce,
    quadrature,
    smc,
    stepping_stones,
    tempered,
    thermodynamic,
)
from pyro_ebm.normalizers.ais import Path
from pyro_ebm.normalizers.bridge import bridged
from pyro_ebm.normalizers.smc import _from_runs
from pyro_ebm.ops.nan_energies import NaNCount

F64 = torch.float64


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


# --- importance sampling


@pytest.mark.parametrize("proposal", [None, dist.Normal(torch.zeros(2), 1.2).to_event(1)])
def test_importance_sampling_covers(proposal):
    law, log_z = tilted(dim=2, factor=0.5)
    check_estimates([importance(law, proposal, num_samples=500) for _ in range(40)], log_z)


@pytest.mark.parametrize("variance", [0.7, 1.5, 3.0])
def test_the_effective_size_is_the_known_one(variance):
    """ESS / S of N(0, 1) against N(0, s2) is sqrt(2 s2 - 1) / s2."""
    law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
    seen = importance(law, dist.Normal(0.0, variance**0.5), num_samples=20_000)
    assert seen.ess / 20_000 == pytest.approx((2 * variance - 1) ** 0.5 / variance, rel=0.05)
    assert float(seen.value) == pytest.approx(0.5 * math.log(2 * math.pi), abs=0.05)


@pytest.mark.parametrize("proposal", [dist.Normal(0.0, 2.0), dist.StudentT(3.0, 1.0, 1.0)])
def test_a_proposal_may_have_a_larger_support(proposal):
    """Its draws outside have no weight, whatever the energy is there: Z = 1 - e^-2."""
    law = EnergyDistribution(
        lambda x: x, event_shape=(), support=dist.constraints.interval(0.0, 2.0)
    )
    check_estimates(
        [importance(law, proposal, num_samples=500) for _ in range(40)],
        math.log(1 - math.exp(-2.0)),
    )


def test_a_strong_tilt_is_not_to_be_trusted():
    seen = importance(three_modes(), num_samples=20_000)
    assert not seen.is_trusted
    with pytest.raises(ValueError, match="no interval can be given: "):
        seen.interval()


# --- the bridge


def test_the_bridge_covers():
    law, log_z = tilted()
    check_estimates([bridge(law, draws_of_tilted((10, 60))) for _ in range(40)], log_z)


def test_the_bridge_covers_with_draws_of_slow_chains():
    """Random walks whose draws are worth a twentieth, of a law that no Gaussian fits."""
    law = EnergyDistribution(lambda x: x**4 / 4 - x**2 / 2, event_shape=())
    estimates = []
    for _ in range(40):
        kernel = RandomWalk(law, step_size=0.5, adapt_step_size=False, adapt_mass_matrix=False)
        mcmc = MCMC(kernel, 400, 60, num_chains=16, disable_progbar=True)
        mcmc.run()
        estimates.append(bridge(law, mcmc.get_samples()["x"]))
    check_estimates(estimates, float(quadrature(law).value))
    spread = torch.stack([e.value for e in estimates]).std()
    assert float(spread) < 1.5 * float(torch.stack([e.stderr for e in estimates]).mean())


def test_the_bridge_on_a_half_line_and_of_a_generalized_ebm():
    law = EnergyDistribution(lambda x: x, event_shape=(), support=dist.constraints.positive)
    draws = torch.empty(10, 1000).exponential_()
    assert abs(float(bridge(law, draws).value)) < 0.05  # of an exponential, Z = 1
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    made = GeneralizedEBM(lambda z: 2.0 * z, prior, lambda x: 0.5 * x.square().sum(-1))
    seen = bridge(made, torch.randn(10, 500, 2) / 5.0**0.5)
    assert float(seen.value) == pytest.approx(-math.log(5.0), abs=0.02)


@pytest.mark.parametrize(("shift", "scale"), [(3.0, 1.0), (0.5, 1.0), (0.0, 1.3)])
def test_draws_of_another_law_are_seen_by_the_bridge(shift, scale):
    """Half a standard deviation off in 1600 draws: the two bridges then differ by .2."""
    found = bridge(normal(), shift + scale * torch.randn(4, 400))
    assert any("the draws are not draws of this law" in doubt for doubt in found.doubts)


@pytest.mark.parametrize("shape", [(40, 10), (4, 1000), (1, 300)])
def test_draws_of_the_law_are_not_doubted(shape):
    """At five errors one in two million is; 60 are looked at, of laws that no Gaussian fits."""
    for _ in range(20):
        uniform = torch.rand(shape)
        laws = {normal(): torch.randn(shape), exponential(): -uniform.log()}
        laws[EnergyDistribution(lambda x: x.abs(), event_shape=())] = (
            torch.where(torch.rand(shape) < 0.5, 1.0, -1.0) * -uniform.log()
        )
        for law, draws in laws.items():
            assert not bridge(law, draws).remarks


# --- annealing and particles


@pytest.mark.parametrize("backwards", [False, True])
def test_annealing_covers(backwards):
    law, log_z = tilted(dim=4)
    estimates = []
    for _ in range(40):
        draws = draws_of_tilted((100,), dim=4) if backwards else None
        estimates.append(
            ais(law, num_chains=100, num_rungs=15, draws=draws, draws_are_exact=backwards)
        )
    check_estimates(estimates, log_z)


def test_bounds_are_below_and_above():
    """With few rungs they are far apart: of 30 runs each mean is beyond by four errors."""
    law, log_z = tilted()
    runs = [
        ais(law, num_chains=50, num_rungs=5, draws=draws_of_tilted((50,)), draws_are_exact=True)
        for _ in range(30)
    ]
    for bounds, sign in ((torch.stack([r.lower for r in runs]), -1.0),
                         (torch.stack([r.upper for r in runs]), 1.0)):  # fmt: skip
        z = sign * (bounds.mean() - log_z) / (bounds.std() / len(bounds) ** 0.5)
        assert float(z) > 4


def test_draws_that_are_not_exact_give_no_bound():
    law, _ = tilted()
    assert ais(law, num_rungs=20, draws=draws_of_tilted((50,))).upper is None


def test_modes_far_from_the_base_are_reached():
    law = three_modes()
    assert ais(law, num_rungs=300).interval()[0] < 0.0 < ais(law, num_rungs=300).interval()[1] + 0.1
    seen = smc(law, num_particles=300)
    assert abs(float(seen.value)) < 5 * float(seen.stderr)


def test_particles_cover():
    law, log_z = tilted(dim=2)
    estimates = [smc(law, num_particles=60, num_runs=10) for _ in range(20)]
    check_estimates(estimates, log_z, coverage=0.7)


def test_the_stated_error_is_that_of_a_mean_of_runs():
    """Of Z over R runs: their sd over their mean and the root of R."""
    log_z = 0.7 * torch.randn(12)
    law, _ = tilted(dim=2)
    found = _from_runs(log_z, law, 12, "base", NaNCount())
    ratios = log_z.exp()
    assert float(found.value) == pytest.approx(float(ratios.mean().log()))
    assert float(found.stderr) == pytest.approx(float(ratios.std() / ratios.mean()) / 12**0.5)


@pytest.mark.parametrize("num_runs", [2, 9, 10])
def test_few_runs_tell_no_error(num_runs):
    """Normal quantiles of a spread over 2 runs cover 70 per cent, over 10 of them 92."""
    found = _from_runs(0.01 * torch.randn(num_runs), tilted()[0], 12, "base", NaNCount())
    assert found.is_trusted == (num_runs == 10)
    assert found.is_trusted or found.doubts[0].startswith(f"{num_runs} runs do not tell an error")


def normal(support=None):
    return EnergyDistribution(lambda x: 0.5 * x**2, event_shape=(), support=support)


def exponential():
    return EnergyDistribution(lambda x: x, event_shape=(), support=dist.constraints.positive)


BAD = {
    "no base": (lambda: ais(EnergyDistribution(lambda x: x**2, event_shape=())), "give base="),
    "no proposal": (
        lambda: importance(EnergyDistribution(lambda x: x**2, event_shape=())),
        "no base to take for the proposal: give proposal=",
    ),
    "batch": (lambda: smc(tilted(2)[0].expand((3,))), r"batch_shape is \(3,\)"),
    "another event": (
        lambda: importance(tilted(2)[0], dist.Normal(0.0, 1.0)),
        r"event_shape \(\), expected \(\) and \(2,\)",
    ),
    "unnormalized": (
        lambda: importance(tilted(2)[0], tilted(2)[0]),
        "must be a normalized distribution",
    ),
    "shape": (lambda: bridge(tilted(2)[0], torch.zeros(4, 2)), r"must be \(chains, draws\) \+"),
    "half a proposal": (
        lambda: importance(normal(), dist.HalfNormal(1.0)),
        r"proposal lives on .* law on Real\(\): .* same, or that of the proposal larger",
    ),
    "a part": (lambda: importance(normal(), dist.Uniform(0.0, 1.0)), "must be the same, or"),
    "counts": (lambda: importance(normal(), dist.Poisson(1.0)), "must be the same, or"),
    "nan draws": (
        lambda: bridge(normal(), torch.full((4, 50), torch.nan)),
        "200 of 200 draws are NaN",
    ),
    "outside": (
        lambda: bridge(exponential(), torch.randn(4, 50)),
        "lie outside of the law's support",
    ),
    "at the edge": (lambda: bridge(exponential(), torch.zeros(4, 50)), "law's support"),
    "constant": (lambda: bridge(normal(), torch.ones(4, 50)), "do not spread in all 1 dimensions"),
    "a plane": (
        lambda: bridge(tilted(2)[0], torch.randn(4, 50, 1).expand(-1, -1, 2)),
        "do not spread in all 2 dimensions",
    ),
    "few": (lambda: bridge(tilted(2)[0], torch.randn(1, 5, 2)), "5 draws are too few"),
    "joined": (
        lambda: ais(tilted(2)[0], num_rungs=3, draws=torch.zeros(4, 5, 2)),
        r"by flatten\(0, 1\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_energies_that_are_not_finite(value):
    law = EnergyDistribution(lambda x: x + value, dist.Normal(0.0, 1.0))
    with pytest.raises(NonFiniteEnergyError):
        importance(law)
    with pytest.raises(NonFiniteEnergyError):
        bridge(law, torch.randn(4, 50))


HALF = math.log(0.5)  # of a standard normal base, the other half NaN
NAN_BELOW = EnergyDistribution(
    lambda x: torch.where(x > 0, 0.0 * x, torch.nan), dist.Normal(torch.tensor(0.0, dtype=F64), 1.0)
)


@pytest.mark.parametrize(
    "estimate",
    [
        importance,
        lambda law: bridge(law, torch.randn(10, 200).abs()),
        lambda law: nce(law, torch.randn(500).abs()),
        lambda law: ais(law, num_rungs=5),
        lambda law: smc(law, num_particles=200, num_runs=4),
        lambda law: stepping_stones(law, tempered(law, num_rungs=2, num_samples=20)),
    ],
    ids=["importance", "bridge", "nce", "ais", "smc", "stepping stones"],
)
@pytest.mark.filterwarnings("ignore:.*energies of some particles are NaN")
@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.ApproximateSampleWarning")
def test_nan_energies_are_counted_and_told(estimate):
    found = estimate(NAN_BELOW)
    assert re.search(r"\d+ of \d+ energies are NaN and counted as infinite", found.remarks[0])
    assert not found.is_trusted
    assert abs(float(found.value) - HALF) < 5 * float(found.stderr) + 1e-9


@pytest.mark.parametrize(
    "estimate",
    [
        importance,
        lambda law: bridge(law, torch.randn(10, 20) / 2**0.5),
        lambda law: nce(law, torch.randn(50) / 2**0.5),
        lambda law: ais(law, num_rungs=5),
        lambda law: smc(law, num_particles=50, num_runs=2),
        lambda law: stepping_stones(law, tempered(law, num_rungs=2, num_samples=20)),
        lambda law: thermodynamic(law, tempered(law, num_rungs=2, num_samples=20)),
        gauss_hermite,
    ],
)
def test_tensors_that_a_function_holds_make_an_estimate_stale(estimate):
    w = torch.ones((), requires_grad=True)
    law = EnergyDistribution(
        lambda x: 0.5 * w * x**2, dist.Normal(torch.tensor(0.0, dtype=F64), 1.0)
    )
    found = estimate(law)
    assert law.with_log_normalizer(found).is_normalized
    with torch.no_grad():
        w.add_(5.0)
    assert found.is_stale
    assert not law.with_log_normalizer(found).is_normalized


# --- how they are made


def test_heavy_tails_are_told():
    """A proposal narrower than the law by a third: the weights have no variance."""
    law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
    seen = importance(law, dist.Normal(0.0, 0.4**0.5), num_samples=20_000)
    assert 0.4 < seen.khat < 0.8  # 1 - .4 where there are infinitely many


def test_the_other_half_is_bridged(monkeypatch):
    """Fitted to the first half of every chain, evaluated at the second."""
    law, _ = tilted(dim=2)
    draws, seen = torch.randn(3, 40, 2), []

    def noted(self, q):
        seen.append(q)
        return torch.zeros(len(q))

    monkeypatch.setattr(DistributionTarget, "potential", noted)
    bridge(law, draws)
    torch.testing.assert_close(seen[0].reshape(3, 20, 2), draws[:, 20:])


def test_rungs_are_those_of_the_way_back(monkeypatch):
    """Forward the kernel stands at beta_1 to beta_K-1; backward at the same, in turn."""
    path = Path.piloted(tilted(dim=2)[0], 5, HMC)
    stops = []
    monkeypatch.setattr(Path, "_moved", lambda self, q, rung: (stops.append(rung), q)[1])
    path.forward(3)
    path.backward(torch.zeros(3, 2))
    assert stops == [0, 1, 2, 3, 3, 2, 1, 0]


def test_runs_keep_the_ladder(monkeypatch):
    plans, run = [], SMC.run

    def noted(self):
        plans.append(self.given_plan)
        run(self)

    monkeypatch.setattr(SMC, "run", noted)
    smc(tilted(dim=2)[0], num_particles=30, num_runs=3)
    assert plans[0] is None
    assert plans[1] is not None
    assert plans[1] is plans[2] is plans[3]


def test_repeated_draws_count_once():
    """Every draw twenty times over says no more: half of the squared error is theirs."""
    law = EnergyDistribution(lambda x: x, event_shape=())
    at_draws, at_noise = torch.randn(10, 50) + 0.5, torch.randn(500) - 0.5
    once = bridged(at_draws, at_noise, "bridge", start="draws", law=law)
    often = bridged(at_draws.repeat_interleave(20, 1), at_noise, "bridge", start="draws", law=law)
    assert float(often.stderr / once.stderr) == pytest.approx(1.0, abs=0.15)
    terms = (torch.sigmoid(once.value - at_draws), torch.sigmoid(at_noise - once.value))
    variances = [float(t.var() / t.mean().square()) / 500 for t in terms]
    assert float(once.stderr) == pytest.approx(sum(variances) ** 0.5, rel=0.1)


def test_a_bridge_counts_proposals_where_the_law_vanishes():
    """Uniform on (-1, 1) by its energy: log Z = log 2, a third of the proposals lies outside."""
    law = EnergyDistribution(
        lambda x: torch.where(x.abs() < 1.0, torch.zeros_like(x), torch.inf), event_shape=()
    )
    found = bridge(law, 2.0 * torch.rand(200, 50, dtype=torch.float64) - 1.0)
    assert abs(float(found.value) - math.log(2.0)) < 5 * float(found.stderr)
    assert float(found.stderr) < 0.02
