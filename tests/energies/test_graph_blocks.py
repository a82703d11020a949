"""Blocks of dyads: what they count, who is entangled, and that a block's draw is reversible."""

import itertools

import pytest
import torch

from pyro_ebm.energies.graph_blocks import BitGraphs, Block, bit_count, tournament
from pyro_ebm.energies.graph_statistics import (
    GWESP,
    Edges,
    GWDegree,
    NodeCovariate,
    NodeMatch,
    Stars,
    Triangles,
    adjacency_of,
    dyads,
    ties_of,
)
from pyro_ebm.energies.graph_sweeps import BlockSweeps
from pyro_ebm.energies.random_graph import ExponentialRandomGraph

F64 = torch.float64
SIZES = [2, 5, 8, 70]  # of which the last needs two words


def statistics(num_nodes):
    values = torch.linspace(-1.0, 2.0, num_nodes)
    labels = torch.arange(num_nodes) % 3
    return {
        "edges": Edges(),
        "covariate": NodeCovariate(values),
        "match": NodeMatch(labels),
        "triangles": Triangles(),
        "1-stars": Stars(1),
        "3-stars": Stars(3),
        "gwdegree": GWDegree(0.4),
        "gwesp": GWESP(0.7),
        "gwesp 0": GWESP(0.0),
    }


def random_graphs(num, num_nodes):
    """Graphs from empty to full."""
    density = torch.linspace(0.0, 1.0, num)[:, None]
    return torch.rand(num, num_nodes * (num_nodes - 1) // 2) < density


def all_graphs(num_nodes):
    size = num_nodes * (num_nodes - 1) // 2
    return (torch.arange(2**size)[:, None] >> torch.arange(size)) & 1 == 1


def test_bits_are_counted():
    words = torch.cat([torch.randint(2**62, (200,)) * 2 + 1, torch.tensor([0, 2**63 - 1])])
    want = [bin(int(word)).count("1") for word in words]
    assert bit_count(words).tolist() == want


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 7, 10])
def test_a_tournament_has_every_dyad_once_and_no_node_twice_in_a_round(num_nodes):
    rounds = tournament(num_nodes)
    for left, right in rounds:
        assert len({*left.tolist(), *right.tolist()}) == 2 * (num_nodes // 2)
    met = [
        tuple(sorted(pair)) for r in rounds for pair in zip(*(x.tolist() for x in r), strict=True)
    ]
    assert sorted(met) == list(itertools.combinations(range(num_nodes), 2))


@pytest.mark.parametrize("num_nodes", SIZES)
def test_bits_hold_the_graphs(num_nodes):
    x = random_graphs(9, num_nodes)
    graphs = BitGraphs(x, num_nodes)
    assert torch.equal(graphs.ties(), x)
    left, right = tournament(num_nodes)[0]
    which = torch.randint(2, (len(left), 9))
    graphs.toggle(left, right, which)
    adjacency = adjacency_of(x.double(), num_nodes)
    adjacency[:, left, right] = (adjacency[:, left, right] - which.T).abs()
    adjacency[:, right, left] = adjacency[:, left, right]
    assert torch.equal(adjacency_of(graphs.ties().double(), num_nodes), adjacency)


@pytest.mark.parametrize("name", statistics(2))
@pytest.mark.parametrize("num_nodes", SIZES)
def test_changes_of_blocks_are_those_of_single_dyads(name, num_nodes):
    x = random_graphs(9, num_nodes)
    graphs, adjacency = BitGraphs(x, num_nodes), adjacency_of(x.double(), num_nodes)
    statistic = statistics(num_nodes)[name]
    for left, right in tournament(num_nodes)[:4]:
        got = statistic.change_of_block(Block(graphs, left, right)).expand(len(left), 9)
        want = [
            statistic.change(adjacency, i.expand(9), j.expand(9))
            for i, j in zip(left, right, strict=True)
        ]
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_nodes", [16, 70])
def test_whole_numbers_are_counted_in_bits(num_nodes):
    terms = list(statistics(num_nodes).values())
    energy = ExponentialRandomGraph(torch.zeros(len(terms), dtype=F64), num_nodes, terms)
    x = random_graphs(300, num_nodes).reshape(3, 100, -1)
    got = energy.statistics(x)
    assert got.shape == (3, 100, len(terms))
    torch.testing.assert_close(got.double(), energy.statistics(x.double()), rtol=1e-6, atol=1e-6)


def test_change_statistics_are_what_recomputing_gives():
    terms = [Edges(), GWESP(0.4), lambda a: (a.sum(-1) == 2).sum(-1).to(a.dtype)]
    energy = ExponentialRandomGraph(torch.zeros(3, dtype=F64), 7, terms)
    x = random_graphs(3, 7)[1].double()
    put, left = x.repeat(21, 1).fill_diagonal_(1.0), x.repeat(21, 1).fill_diagonal_(0.0)
    want = energy.statistics(put) - energy.statistics(left)
    torch.testing.assert_close(energy.change_statistics(x), want)


# --- the draw of a block

MODELS = {
    "triangles": ([Edges(), Triangles(), Stars(2)], [-0.8, 0.9, -0.1]),
    "gwesp": ([Edges(), GWESP(0.5)], [-0.7, 0.8]),
    "gwesp, degrees": ([Edges(), GWESP(1.5), GWDegree(0.3)], [-1.0, -0.6, 0.9]),
}


def blocks(name, num_nodes):
    """Sweeps that hold all graphs, one a chain, and a block of them."""
    terms, theta = MODELS[name]
    x = all_graphs(num_nodes)
    theta = torch.tensor(theta, dtype=F64)
    sweeps = BlockSweeps(x, theta.expand(len(x), -1), tuple(terms), num_nodes)
    energy = ExponentialRandomGraph(theta, num_nodes, terms)
    return sweeps, -energy(x.double()), tournament(num_nodes)[0]


def log_moves(sweeps, left, right, toggles):
    """Log chances that exactly these dyads of the block are toggled, ``(C,)``."""
    block = Block(sweeps.graphs, left, right)
    to = block.tied ^ toggles[:, None]
    log_p = torch.where(to == 1, 1.0, -1.0) * sweeps.log_odds(block)
    log_p = torch.nn.functional.logsigmoid(log_p)
    stays = torch.where(toggles[:, None] == 1, -torch.inf, 0.0).double()
    held = block.entangled if sweeps._entangles else torch.zeros_like(to, dtype=torch.bool)
    return torch.where(held, stays, log_p).sum(0), held


@pytest.mark.parametrize("num_nodes", [4, 5, 6])
@pytest.mark.parametrize("name", MODELS)
def test_the_draw_of_a_block_is_reversible(name, num_nodes):
    """Between all pairs of graphs that differ in nothing but the block."""
    sweeps, log_p, (left, right) = blocks(name, num_nodes)
    i, j = dyads(num_nodes)
    pairs = {pair: k for k, pair in enumerate(zip(i.tolist(), j.tolist(), strict=True))}
    at = [pairs[min(p), max(p)] for p in zip(left.tolist(), right.tolist(), strict=True)]
    code, seen = torch.arange(len(log_p)), 0
    for toggles in itertools.product([0, 1], repeat=len(left)):
        to = code ^ sum(bit << k for bit, k in zip(toggles, at, strict=True))
        forth, held = log_moves(sweeps, left, right, torch.tensor(toggles))
        flow = (log_p + forth).exp()
        torch.testing.assert_close(flow, flow[to], rtol=1e-10, atol=0.0)
        seen += int(held.sum())
    assert (seen > 0) == (name != "triangles")


def test_a_block_is_drawn_with_the_chances_it_says():
    sweeps, _, (left, right) = blocks("gwesp", 5)
    block = Block(sweeps.graphs, left, right)
    before, p, held = block.tied.bool(), sweeps.log_odds(block).sigmoid(), block.entangled
    tie = torch.rand(p.shape) < 0.5
    sweeps.draw(left, right, p + torch.where(tie, -1e-9, 1e-9))
    after = sweeps.graphs.tied(left, right).bool()
    assert torch.equal(after, torch.where(held, before, tie))


def test_of_entangled_dyads_the_first_is_drawn():
    """The dyads (0, 1) and (2, 3) with three ties between them, and with two."""
    adjacency = torch.zeros(2, 4, 4, dtype=torch.bool)
    for graph, ties in enumerate(([(0, 2), (0, 3), (1, 2)], [(0, 2), (1, 3)])):
        for i, j in ties:
            adjacency[graph, i, j] = adjacency[graph, j, i] = True
    graphs = BitGraphs(ties_of(adjacency), 4)
    for left, right in (([0, 2], [1, 3]), ([3, 1], [2, 0])):
        entangled = Block(graphs, torch.tensor(left), torch.tensor(right)).entangled
        assert entangled.tolist() == [[False, False], [True, False]]


def test_one_sweep_of_independent_dyads_is_an_exact_draw():
    theta = torch.tensor([-0.5, 0.8], dtype=F64)
    energy = ExponentialRandomGraph(theta, 4, [Edges(), NodeMatch([0, 1, 0, 1])])
    x = energy.sweep(torch.ones(20_000, 6, dtype=torch.bool), 1)
    p = (-energy(all_graphs(4).double())).softmax(0)
    seen = torch.bincount(x.long() @ (2 ** torch.arange(6)), minlength=64).double()
    chi_square = ((seen - 20_000 * p).square() / (20_000 * p)).sum()
    assert abs(float(chi_square) - 63.0) < 5 * (2 * 63.0 + float((1 / p).sum()) / 20_000) ** 0.5
