"""Exponential random graphs: what is counted, what is exact, toggles by their whole matrix."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import EnergyDistribution, check_model
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.energies.graph_statistics import (
    GWESP,
    DyadStatistic,
    Edges,
    GraphStatistic,
    GWDegree,
    NodeCovariate,
    NodeMatch,
    Stars,
    Triangles,
    adjacency_of,
    dyads,
    ties_of,
)
from pyro_ebm.energies.graph_toggles import TieToggles
from pyro_ebm.energies.random_graph import ExponentialRandomGraph
from pyro_ebm.mcmc import MCMC, Exchange, Sweeps

F64 = torch.float64
NODES = 7
VALUES = [0.5, -1.0, 2.0, 0.25, 3.0, -0.125, 1.0]
LABELS = ["a", "b", "a", "c", "b", "a", "c"]


class Isolates(GraphStatistic):
    """Made by a user: it knows no change of its own."""

    def __call__(self, adjacency):
        return (adjacency.sum(-1) == 0).sum(-1).to(adjacency.dtype)


class Lopsided(Isolates):
    """Its change has a dim too many."""

    def change(self, adjacency, i, j):
        return super().change(adjacency, i, j).unsqueeze(-1)


class Distance(DyadStatistic):
    """Made by a user, of dyads alone."""

    def weights(self, i, j):
        return (i - j).abs().double()


STATISTICS = {
    "edges": Edges(),
    "triangles": Triangles(),
    "1-stars": Stars(1),
    "2-stars": Stars(2),
    "3-stars": Stars(3),
    "gwesp": GWESP(0.7),
    "gwesp 0": GWESP(0.0),
    "gwdegree": GWDegree(0.4),
    "gwdegree 0": GWDegree(0.0),
    "covariate": NodeCovariate(VALUES),
    "match": NodeMatch(LABELS),
    "isolates": Isolates(),
    "distance": Distance(),
}


def by_hand(name, ties):
    """A statistic of one graph, a set of pairs i < j, by its definition."""
    beside = {i: {j for pair in ties for j in pair if i in pair and j != i} for i in range(NODES)}
    shared = [len(beside[i] & beside[j]) for i, j in ties]
    degrees = [len(beside[i]) for i in range(NODES)]

    def weighted(counts, decay):
        return sum(math.exp(decay) * (1 - (1 - math.exp(-decay)) ** s) for s in counts)

    return {
        "edges": lambda: len(ties),
        "triangles": lambda: sum(
            all(pair in ties for pair in itertools.combinations(three, 2))
            for three in itertools.combinations(range(NODES), 3)
        ),
        "1-stars": lambda: 2 * len(ties),
        "2-stars": lambda: sum(math.comb(d, 2) for d in degrees),
        "3-stars": lambda: sum(math.comb(d, 3) for d in degrees),
        "gwesp": lambda: weighted(shared, 0.7),
        "gwesp 0": lambda: sum(s > 0 for s in shared),
        "gwdegree": lambda: weighted(degrees, 0.4),
        "gwdegree 0": lambda: sum(d > 0 for d in degrees),
        "covariate": lambda: sum(VALUES[i] + VALUES[j] for i, j in ties),
        "match": lambda: sum(LABELS[i] == LABELS[j] for i, j in ties),
        "isolates": lambda: degrees.count(0),
        "distance": lambda: sum(j - i for i, j in ties),
    }[name]()


def pairs_of(x):
    i, j = dyads(NODES)
    return {(int(a), int(b)) for a, b, tie in zip(i, j, x, strict=True) if tie}


def random_graphs(num, num_nodes=NODES):
    """Graphs from empty to full."""
    density = torch.linspace(0.0, 1.0, num, dtype=F64)[:, None]
    return (torch.rand(num, num_nodes * (num_nodes - 1) // 2, dtype=F64) < density).double()


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_what_they_are_called(name):
    x = random_graphs(20)
    want = torch.tensor([by_hand(name, pairs_of(row)) for row in x], dtype=F64)
    got = STATISTICS[name](adjacency_of(x, NODES))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", STATISTICS)
def test_change_is_what_recomputing_gives(name):
    """Every dyad of graphs from empty to full, whether there is a tie or not."""
    statistic, x = STATISTICS[name], random_graphs(15)
    for dyad, (i, j) in enumerate(zip(*dyads(NODES), strict=True)):
        put, left = x.clone(), x.clone()
        put[:, dyad], left[:, dyad] = 1.0, 0.0
        want = statistic(adjacency_of(put, NODES)) - statistic(adjacency_of(left, NODES))
        adjacency = adjacency_of(x, NODES)
        for ends in ((i, j), (j, i)):
            got = statistic.change(adjacency, *(end.expand(15) for end in ends))
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_and_changes_take_any_batch_and_vmap(name):
    statistic = STATISTICS[name]
    adjacency = adjacency_of(random_graphs(6), NODES)
    i, j = torch.tensor([0, 1, 2, 6, 4, 3]), torch.tensor([3, 0, 5, 5, 6, 2])
    for function, args in ((statistic, (adjacency,)), (statistic.change, (adjacency, i, j))):
        want = function(*args)
        assert want.dtype == F64
        folded = function(*(arg.reshape(2, 3, *arg.shape[1:]) for arg in args))
        torch.testing.assert_close(folded, want.reshape(2, 3))
        torch.testing.assert_close(torch.vmap(function)(*args), want)
        single = function(args[0][2].float(), *(arg[2] for arg in args[1:]))
        torch.testing.assert_close(single, want[2].float())


def test_dyads_and_matrices_are_two_ways_to_write_a_graph():
    x = random_graphs(10).reshape(2, 5, -1)
    adjacency = adjacency_of(x, NODES)
    assert adjacency.shape == (2, 5, NODES, NODES)
    assert torch.equal(adjacency, adjacency.mT)
    assert not adjacency.diagonal(dim1=-2, dim2=-1).any()
    i, j = torch.triu_indices(NODES, NODES, 1)
    assert torch.equal(adjacency[..., i, j], x)
    assert torch.equal(ties_of(adjacency), x)


# --- what is exact

POINT = torch.tensor([-1.0, 0.5], dtype=F64)
TERMS = [Edges(), Triangles()]
KNOWN = {  # n: log Z, mean number of edges, of triangles
    4: (1.93264599, 1.732943, 0.142413),
    5: (3.27408524, 3.019603, 0.408489),
    6: (5.00378912, 4.780991, 0.966313),
}
MODELS = {
    "edges, triangles": (TERMS, [-1.0, 0.5]),
    "gwesp, degrees": ([Edges(), GWESP(0.5), GWDegree(0.3)], [-1.2, 0.4, 0.6]),
    "stars, match": ([Edges(), Stars(2), NodeMatch([0, 1, 0, 1, 1])], [-0.3, -0.2, 0.9]),
    "independent": ([Edges(), NodeCovariate(VALUES[:5]), NodeMatch(LABELS[:5])], [-0.5, 0.3, 0.8]),
    "a function": ([Edges(), lambda a: (a.sum(-1) == 2).sum(-1).to(a.dtype)], [0.2, -0.7]),
}


def all_graphs(num_nodes):
    size = num_nodes * (num_nodes - 1) // 2
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=F64)


def cell_of(x):
    """The number of each graph in the order of :func:`all_graphs`."""
    size = x.shape[-1]
    return x.long() @ (2 ** torch.arange(size - 1, -1, -1))


def made(name, *, num_nodes=5):
    statistics, theta = MODELS[name]
    return ExponentialRandomGraph(torch.tensor(theta, dtype=F64), num_nodes, statistics)


@pytest.mark.parametrize("num_nodes", KNOWN)
def test_known_answers(num_nodes):
    theta = POINT.clone().requires_grad_()
    log_z = ExponentialRandomGraph(theta, num_nodes, TERMS).log_normalizer()
    assert log_z.dtype == F64
    edges, triangles = torch.autograd.grad(log_z, theta)[0]
    want = KNOWN[num_nodes]
    assert float(log_z.detach()) == pytest.approx(want[0], abs=5e-9)
    assert (float(edges), float(triangles)) == pytest.approx(want[1:], abs=5e-7)


@pytest.mark.parametrize("name", MODELS)
def test_log_normalizer_is_the_sum_over_all_graphs(name):
    energy = made(name)
    want = torch.logsumexp(-energy(all_graphs(5)), 0)
    torch.testing.assert_close(energy.log_normalizer(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_derivatives_of_log_normalizer(name):
    statistics, theta = MODELS[name]

    def log_z(theta):
        return ExponentialRandomGraph(theta, 5, statistics).log_normalizer()

    energy, x = made(name), all_graphs(5)
    p, t = (-energy(x)).softmax(0), energy.statistics(x)
    mean = p @ t
    theta = torch.tensor(theta, dtype=F64)
    batch = torch.stack([theta, theta - 0.3])
    gradient = torch.vmap(torch.func.grad(log_z))(batch)[0]
    torch.testing.assert_close(gradient, mean)
    hessian = torch.func.jacrev(torch.func.grad(log_z))(theta)
    torch.testing.assert_close(hessian, (p[:, None] * (t - mean)).T @ (t - mean))
    torch.testing.assert_close(torch.vmap(log_z)(batch), log_z(batch))


def chi_square(x, p):
    """Pearson's statistic of draws over all graphs, as standard deviations above its mean.

    Cells in which fewer than five draws are expected are made one; what is impossible is infinite.
    """
    seen = torch.bincount(cell_of(x), minlength=len(p)).double()
    if bool((seen[p == 0] > 0).any()):
        return math.inf
    rare = len(x) * p < 5
    p = torch.cat([p[~rare], p[rare].sum().reshape(1)])
    seen = torch.cat([seen[~rare], seen[rare].sum().reshape(1)])
    seen, p = seen[p > 0], p[p > 0]
    chi = ((seen - len(x) * p).square() / (len(x) * p)).sum()
    # Rare cells make the variance larger than that of a chi square.
    variance = 2.0 * (len(p) - 1) + (1.0 / p).sum() / len(x)
    return float((chi - (len(p) - 1)) / variance.sqrt())


@pytest.mark.parametrize("name", MODELS)
def test_draws_are_exact(name):
    energy = made(name)
    p = (-energy(all_graphs(5))).softmax(0)
    assert abs(chi_square(energy.sample((20_000,)), p)) < 5
    other = energy.with_natural(energy.natural() + 0.1)
    assert chi_square(other.sample((20_000,)), p) > 5


def test_a_batch_of_laws_is_drawn_each_from_its_own():
    theta = torch.stack([POINT, -POINT, 0.0 * POINT])
    energy = ExponentialRandomGraph(theta, 4, TERMS)
    x = energy.sample((4, 5000))
    assert x.shape == (4, 5000, 3, 6)
    weights = (energy.statistics(all_graphs(4)) @ theta.T).softmax(0)
    for which in range(3):
        assert abs(chi_square(x[:, :, which].flatten(0, 1), weights[:, which])) < 5
    assert energy.sample().shape == (3, 6)


@pytest.mark.parametrize("name", ["edges, triangles", "independent"])
def test_draws_at_lost_coefficients_are_nan_and_sweeps_stay(name):
    """As chains of exchange meet them, which reject what is not a number."""
    good = made(name)
    theta = torch.stack([good.natural(), torch.nan * good.natural()])
    energy = good.with_natural(theta)
    x = energy.sample((7,))
    assert not x[:, 0].isnan().any()
    assert x[:, 1].isnan().all()
    start = torch.ones(2, 10)
    moved = energy.sweep(start, 3)
    assert not torch.equal(moved[0], start[0])
    assert torch.equal(moved[1], start[1])


def test_independent_dyads_are_a_logistic_regression():
    """With edges alone the most likely coefficient is the log odds of the density."""
    x = random_graphs(3, 30)[1]
    theta = torch.logit(x.mean()).reshape(1).requires_grad_()
    energy = ExponentialRandomGraph(theta, 30, [Edges()])
    (slope,) = torch.autograd.grad(energy(x) + energy.log_normalizer(), theta)
    assert abs(float(slope)) < 1e-10
    log_z = float(energy.log_normalizer().detach())
    assert log_z == pytest.approx(-435 * math.log1p(-float(x.mean())))


def test_independent_dyads_are_bernoulli_at_any_size():
    values, labels = torch.randn(40, dtype=F64), torch.randint(0, 3, (40,))
    theta = torch.tensor([-1.0, 0.3, 0.7], dtype=F64)
    statistics = [Edges(), NodeCovariate(values), NodeMatch(labels)]
    energy = ExponentialRandomGraph(theta, 40, statistics)
    i, j = dyads(40)
    odds = -1.0 + 0.3 * (values[i] + values[j]) + 0.7 * (labels[i] == labels[j])
    x = random_graphs(4, 40)
    want = dist.Bernoulli(logits=odds).log_prob(x).sum(-1)
    law = EnergyDistribution(energy)
    assert law.is_normalized
    torch.testing.assert_close(law.log_prob(x), want)
    off = energy.sample((4000,)).mean(0) - odds.sigmoid()
    assert float((off.abs() / (odds.sigmoid() * (-odds).sigmoid() / 4000).sqrt()).max()) < 5.5


# --- toggles


def step_matrix(energy):
    """The matrix of one toggle over all graphs, by every choice that it draws among.

    60 places make every number of ties or dyads up to six come out equally often.
    """
    x = all_graphs(energy.num_nodes)
    places = (torch.arange(60, dtype=F64) + 0.5) / 60
    coin = torch.tensor([False, True])
    start = x.repeat_interleave(120, 0)
    theta = energy.natural().expand(len(start), -1)
    toggles = TieToggles(start, theta, energy.terms, energy.num_nodes)
    proposal = toggles.propose(coin.repeat_interleave(60).repeat(64), places.repeat(128))
    toggles.move(proposal, torch.full((len(start),), -torch.inf, dtype=F64))
    accept = proposal.log_ratio.clamp(max=0.0).exp()
    matrix = torch.zeros(64, 64, dtype=F64)
    to = cell_of(ties_of(toggles.adjacency))
    matrix.index_put_((cell_of(start), to), accept / 120, accumulate=True)
    return matrix + torch.diag(1.0 - matrix.sum(1))


FOUR = {
    name: (statistics, theta)
    for name, (statistics, theta) in {
        **MODELS,
        "stars, match": ([Edges(), Stars(2), NodeMatch(LABELS[:4])], [-0.3, -0.2, 0.9]),
        "independent": ([Edges(), NodeCovariate(VALUES[:4])], [-0.5, 0.3]),
        "sparse": (TERMS, [-4.0, 1.0]),
    }.items()
}


@pytest.mark.parametrize("name", FOUR)
def test_a_toggle_is_reversible(name):
    statistics, theta = FOUR[name]
    energy = ExponentialRandomGraph(torch.tensor(theta, dtype=F64), 4, statistics)
    p, matrix = (-energy(all_graphs(4))).softmax(0), step_matrix(energy)
    flow = p[:, None] * matrix
    assert float((flow - flow.T).abs().max()) < 1e-10
    assert float((p @ matrix - p).abs().max()) < 1e-10
    assert float(matrix.min()) >= 0.0
    assert bool((torch.linalg.matrix_power(matrix, 8) > 0).all())  # all graphs are reached


@pytest.mark.parametrize("name", FOUR)
def test_proposals_are_half_tie_no_tie(name):
    """Of the flow between two graphs, the larger direction is proposed and always accepted."""
    statistics, theta = FOUR[name]
    energy = ExponentialRandomGraph(torch.tensor(theta, dtype=F64), 4, statistics)
    x, matrix = all_graphs(4), step_matrix(energy)
    p, num_ties = (-energy(x)).softmax(0), x.sum(1)
    for start, to in ((a, b) for a in range(64) for b in range(64) if (a ^ b).bit_count() == 1):
        q = [
            proposal_by_hand(float(num_ties[g]), float(num_ties[g] - num_ties[h]))
            for g, h in ((start, to), (to, start))
        ]
        want = min(q[0], float(p[to] / p[start]) * q[1])
        assert float(matrix[start, to]) == pytest.approx(want, rel=1e-10)


def proposal_by_hand(num_ties, removed):
    """How likely one dyad of six is, a tie if it is to be removed."""
    if num_ties == 0:
        return 1 / 6
    return 1 / 12 + (1 / (2 * num_ties) if removed > 0 else 0.0)


def test_what_is_accepted_is_what_lies_below_the_ratio():
    energy = made("edges, triangles", num_nodes=6)
    x = energy.sample((2000,))
    toggles = TieToggles(x, energy.natural().expand(2000, -1), energy.terms, 6)
    proposal = toggles.propose(torch.rand(2000) < 0.5, torch.rand(2000, dtype=F64))
    above = torch.rand(2000) < 0.5
    toggles.move(proposal, proposal.log_ratio + torch.where(above, 1e-9, -1e-9))
    moved = (ties_of(toggles.adjacency) != x).sum(1)
    assert torch.equal(moved, (~above).long())


@pytest.mark.parametrize("num_nodes", [2, 3, 9])
def test_the_order_keeps_ties_first(num_nodes):
    x = random_graphs(50, num_nodes)
    theta = torch.tensor([-0.5, 0.1], dtype=F64).expand(50, 2)
    toggles = TieToggles(x, theta, tuple(TERMS), num_nodes)
    for _ in range(4):
        toggles.sweep()
        ties = ties_of(toggles.adjacency)
        order = toggles.order.reshape(50, -1)
        assert torch.equal(toggles.adjacency, toggles.adjacency.mT)
        assert torch.equal(order.sort(1).values, torch.arange(x.shape[1]).expand_as(order))
        assert torch.equal(toggles.num_ties, ties.sum(1).long())
        first = torch.arange(x.shape[1]) < toggles.num_ties[:, None]
        assert torch.equal(ties.gather(1, order), first.double())
    assert not torch.equal(ties, x)


@pytest.mark.parametrize("start", [0, 1, 37, 63])
def test_a_sweep_lands_where_the_matrix_says(start):
    """From the empty graph, one tie, some and the full one: six toggles."""
    energy = ExponentialRandomGraph(POINT, 4, TERMS)
    theta = energy.natural().expand(30_000, -1)
    toggles = TieToggles(all_graphs(4)[start].expand(30_000, 6), theta, energy.terms, 4)
    toggles.sweep()
    x = toggles.ties()
    p = torch.linalg.matrix_power(step_matrix(energy), 6)[start]
    assert abs(chi_square(x, p)) < 5
    assert chi_square(x, torch.linalg.matrix_power(step_matrix(energy), 5)[start]) > 5


@pytest.mark.parametrize("name", MODELS)
def test_sweeps_keep_exact_draws(name):
    energy = made(name)
    x = energy.sample((20_000,))
    moved = energy.sweep(x, 2)
    assert bool((moved != x).any())
    assert drift(energy, x, moved) < 5
    other = energy.with_natural(energy.natural() + 0.1).sweep(x, 2)
    assert drift(energy, x, other) > 5  # a tenth more of every coefficient is seen


def drift(energy, x, moved):
    """By how many standard errors the mean of a statistic has moved, at most."""
    change = energy.statistics(moved) - energy.statistics(x)
    return float((change.mean(0) / (change.std(0) / len(x) ** 0.5)).abs().max())


@pytest.mark.parametrize("by", ["blocks", "toggles"])
def test_each_graph_of_a_batch_moves_by_its_own_coefficients(by):
    theta = torch.tensor([[-8.0, 0.0], [8.0, 0.0]], dtype=F64)
    other = Triangles() if by == "blocks" else lambda adjacency: adjacency.new_zeros(len(adjacency))
    energy = ExponentialRandomGraph(theta, 8, [Edges(), other])
    x = torch.zeros(3, 5, 1, 28)
    moved = energy.sweep(x, 12)
    assert moved.shape == (3, 5, 2, 28)
    assert moved.dtype == x.dtype
    density = moved.mean((0, 1, 3))
    assert float(density[0]) < 0.02
    assert float(density[1]) > 0.97
    assert not x.any()
    assert energy.sweep(x[:0], 1).shape == (0, 5, 2, 28)


def test_whole_numbers_stay_whole():
    energy = ExponentialRandomGraph(POINT, 5, TERMS)
    for dtype in (torch.bool, torch.long, torch.float32):
        x = random_graphs(6, 5).to(dtype)
        assert energy.sweep(x, 1).dtype == dtype
        assert energy(x).shape == (6,)


# --- parameters


def test_coefficients_keep_their_graph():
    theta = nn.Parameter(torch.tensor([-1.0, 0.5]))
    energy = ExponentialRandomGraph(theta, 4, TERMS)
    assert [name for name, _ in energy.named_parameters()] == ["theta"]
    (energy(torch.ones(6)) + energy.log_normalizer()).backward()
    want = torch.tensor(KNOWN[4][1:]) - torch.tensor([6.0, 4.0])
    torch.testing.assert_close(theta.grad, want, rtol=1e-6, atol=1e-6)


def test_scalars_may_be_stacked():
    edges = torch.tensor(-1.0, requires_grad=True)
    energy = ExponentialRandomGraph(torch.stack([edges, torch.tensor(0.5)]), 4, TERMS)
    energy.log_normalizer().backward()
    assert float(edges.grad) == pytest.approx(KNOWN[4][1], abs=1e-6)


def test_other_natural_parameters_leave_the_first_ones_alone():
    energy = ExponentialRandomGraph(nn.Parameter(POINT), 4, TERMS)
    other = energy.with_natural(torch.zeros(3, 2))
    assert isinstance(other, ExponentialFamily)
    assert other.batch_shape == (3,)
    torch.testing.assert_close(other.log_normalizer(), torch.full((3,), 6 * math.log(2.0)))
    torch.testing.assert_close(energy.natural(), POINT, check_dtype=True)
    assert not list(other.parameters())


def test_numbers_follow_the_dtype_of_graphs():
    energy = ExponentialRandomGraph([-1.0, 0.5], 4, TERMS)
    assert energy(torch.ones(6, dtype=F64)).dtype == F64
    assert energy(torch.ones(6)).dtype == torch.float32
    assert energy.log_normalizer().dtype == torch.float32


def test_enumerating_in_inference_mode_does_not_spoil_gradients():
    class Mine(Isolates):
        """Its own hash: nothing is remembered of it yet."""

    with torch.inference_mode():
        ExponentialRandomGraph([0.3], 4, [statistic := Mine()]).log_normalizer()
    theta = torch.tensor([0.3], requires_grad=True)
    ExponentialRandomGraph(theta, 4, [statistic]).log_normalizer().backward()
    assert 0.0 < float(theta.grad) < 4.0


def test_changes_in_inference_mode_do_not_spoil_gradients():
    adjacency = adjacency_of(random_graphs(11), NODES)
    i, j = torch.zeros(11, dtype=torch.long), torch.ones(11, dtype=torch.long)
    with torch.inference_mode():
        Triangles().change(adjacency, i, j)
    Triangles().change(adjacency.requires_grad_(), i, j).sum().backward()
    torch.testing.assert_close(adjacency.grad[:, 0], adjacency[:, 1].detach())


@pytest.mark.parametrize(
    ("statistics", "num_nodes", "known"),
    [
        (TERMS, 6, True),
        (TERMS, 7, False),
        ([Edges(), Distance()], 50, True),
        ([Edges(), Stars(2)], 50, False),
    ],
)
def test_what_is_known_where(statistics, num_nodes, known):
    law = EnergyDistribution(ExponentialRandomGraph([0.1, 0.2], num_nodes, statistics))
    assert law.is_normalized is known
    assert law.has_exact_sample is known


BAD = {
    "one node": (lambda: ExponentialRandomGraph([0.1], 1, [Edges()]), ValueError, "at least 2"),
    "none": (lambda: ExponentialRandomGraph([], 4, []), ValueError, "at least one"),
    "too few": (
        lambda: ExponentialRandomGraph([0.1], 4, TERMS),
        ValueError,
        r"shape \(..., 2\), one for each statistic, got \(1,\)",
    ),
    "a scalar": (
        lambda: ExponentialRandomGraph(torch.tensor(0.1), 4, [Edges()]),
        ValueError,
        r"got \(\); torch.stack",
    ),
    "whole": (
        lambda: ExponentialRandomGraph(torch.tensor([1]), 4, [Edges()]),
        TypeError,
        "must be floating",
    ),
    "a class": (lambda: ExponentialRandomGraph([0.1], 4, [Edges]), TypeError, r"such as Edges\(\)"),
    "a name": (lambda: ExponentialRandomGraph([0.1], 4, ["edges"]), TypeError, "got 'edges'"),
    "other nodes": (
        lambda: ExponentialRandomGraph([0.1], 4, [NodeCovariate(VALUES)]),
        ValueError,
        "has values for 7 nodes, but num_nodes is 4",
    ),
    "other shape": (
        lambda: ExponentialRandomGraph([0.1], 4, [lambda a: a.sum(-1)])(torch.ones(5, 6)),
        ValueError,
        r"returned shape \(5, 4\) .* expected \(5,\)",
    ),
    "other shape of a change": (
        lambda: ExponentialRandomGraph([0.1], 4, [Lopsided()]).sweep(torch.ones(5, 6), 1),
        ValueError,
        r"returned shape \(5, 1\) .* expected \(5,\)",
    ),
    "an adjacency matrix": (
        lambda: ExponentialRandomGraph([0.1], 4, [Edges()])(torch.ones(4, 4)),
        ValueError,
        r"vector of its 6 dyads, .*ties_of\(adjacency\) reads",
    ),
    "counted matrix": (
        lambda: ExponentialRandomGraph([0.1], 4, [Edges()]).statistics(torch.ones(4, 4)),
        ValueError,
        r"vector of its 6 dyads, .*ties_of\(adjacency\) reads",
    ),
    "swept matrix": (
        lambda: ExponentialRandomGraph([0.1], 4, [Edges()]).sweep(torch.ones(4, 4), 1),
        ValueError,
        r"vector of its 6 dyads, .*ties_of\(adjacency\) reads",
    ),
    "too many": (
        lambda: ExponentialRandomGraph([0.1, 0.2], 7, TERMS).log_normalizer(),
        NotImplementedError,
        "enumerated up to 6 nodes, got 7",
    ),
    "too many to draw": (
        lambda: ExponentialRandomGraph([0.1, 0.2], 7, TERMS).sample(),
        NotImplementedError,
        r"move graphs by sweep\(\)",
    ),
    "no star": (lambda: Stars(0), ValueError, "from 1 on, got 0"),
    "half a star": (lambda: Stars(1.5), ValueError, "from 1 on, got 1.5"),
    "negative decay": (lambda: GWESP(-0.1), ValueError, "decay of GWESP must be .* got -0.1"),
    "endless decay": (lambda: GWDegree(math.inf), ValueError, "decay of GWDegree"),
    "free decay": (lambda: GWESP(torch.tensor(0.5)), ValueError, "a fixed number"),
    "a table": (lambda: NodeCovariate(torch.ones(3, 2)), ValueError, r"got shape \(3, 2\)"),
    "inferred": (
        lambda: NodeCovariate(torch.ones(3, requires_grad=True)),
        ValueError,
        "with a gradient",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        make()


# --- exchange


class Hidden(ExponentialRandomGraph):
    """Keeps its log Z to itself."""

    is_tractable = False


class Inexact(Hidden):
    """Has no exact draws either."""

    is_sampleable = False


# A triangle with a tail of two: five ties, one triangle. A star: four ties, no triangle.
TAILED = torch.tensor([1, 1, 0, 0, 1, 0, 0, 1, 0, 1], dtype=F64)
STAR = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], dtype=F64)


def posterior(graph):
    """Mean and variances of both coefficients by quadrature, log Z from the enumeration."""
    line = torch.linspace(-12.0, 12.0, 241, dtype=F64)
    theta = torch.cartesian_prod(line, line)
    energy = ExponentialRandomGraph(theta, 5, TERMS)
    log_p = -energy(graph) - energy.log_normalizer()
    log_p = log_p + dist.Normal(0.0, 2.0).log_prob(theta).sum(-1)
    weights = log_p.softmax(0)
    mean = weights @ theta
    return mean, weights @ (theta - mean).square()


def check(draws, mean, variance, precision=0.04):
    """Gates at five standard errors, from the spread of the chains' own means."""
    for values, wanted in ((draws, mean), ((draws - mean).square(), variance)):
        means = values.mean(1)
        error = means.std(0) / len(means) ** 0.5
        assert float(((means.mean(0) - wanted) / error).abs().max()) < 5
        assert float((error / (variance.sqrt() if values is draws else variance)).max()) < precision


def one_graph(energy):
    def model(x):
        prior = dist.Normal(torch.zeros(2, dtype=F64), 2.0).to_event(1)
        theta = pyro.sample("theta", prior)
        pyro.sample("x", EnergyDistribution(energy(theta, 5, TERMS)), obs=x)

    return model


def two_graphs(x):
    with pyro.plate("graphs", 2):
        prior = dist.Normal(torch.zeros(2, dtype=F64), 2.0).to_event(1)
        theta = pyro.sample("theta", prior)
        pyro.sample("x", EnergyDistribution(Hidden(theta, 5, TERMS)), obs=x)


def run(kernel, x, num_samples, warmup_steps=100):
    torch.set_default_dtype(F64)
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=256, disable_progbar=True)
    mcmc.run(x)
    return mcmc.get_samples()["theta"]


@pytest.mark.parametrize("graph", [TAILED, STAR], ids=["tailed", "star"])
def test_exchange_with_exact_draws_finds_the_posterior(graph):
    kernel = Exchange(one_graph(Hidden))
    check(run(kernel, graph, 250), *posterior(graph))
    assert kernel.adjusted


def test_exchange_gives_each_graph_coefficients_of_its_own():
    draws = run(Exchange(two_graphs), torch.stack([TAILED, STAR]), 200, 100)
    check(draws[:, :, 0], *posterior(TAILED), precision=0.06)
    check(draws[:, :, 1], *posterior(STAR), precision=0.06)


def test_exchange_with_sweeps_finds_the_posterior():
    kernel = Exchange(one_graph(Inexact), auxiliary=Sweeps(10))
    check(run(kernel, TAILED, 50, 40), *posterior(TAILED), precision=0.06)
    assert not kernel.adjusted


def test_a_model_of_ties_in_bits_is_checked():
    """Pyro hands the energy a tensor whose shape, once cut, is a plain tuple."""

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        graphs = ExponentialRandomGraph(theta, 5, [Edges(), Triangles()])
        pyro.sample("x", EnergyDistribution(graphs), obs=x)

    assert "log Z known by the energy" in str(check_model(model, torch.rand(10) < 0.5))
