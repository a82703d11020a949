"""Graphs without repetitions: the same numbers, and nothing merged that must not be."""

import pytest
import torch
from small_cases import F64
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.mcmc import MCMC, RandomWalk
from pyro_ebm.mcmc.targets.failing_rows import nan_where_it_fails
from pyro_ebm.ops.graph_memory import separate_outputs
from pyro_ebm.ops.graph_simplification import let_factorizations_fail, simplify


def captured(fn, *args):
    return make_fx(fn)(*args)


def num_calls(graph):
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def test_repeated_work_is_done_once():
    x = torch.randn(4, 3, dtype=torch.float64)
    graph = captured(lambda x: (x.exp() + x.exp()).detach() - x.neg().neg(), x)
    simplify(graph)
    assert num_calls(graph) == 3  # exp, add, sub
    assert torch.equal(graph(x), 2 * x.exp() - x)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x * 1.0).pow(2) + (x * 1).pow(2.0),
        lambda x: torch.where(x > 0, x.abs().log(), 0.0) + torch.where(x > 0, x.abs().log(), 1.0),
        lambda x: torch.cat([x, x]).sum(0) - torch.cat([x, -x]).sum(0),
        lambda x: torch.logsumexp(x, 0) + x.sum((0, 1)) + x.sum((1, 0)),
    ],
)
def test_numbers_stay_the_same(fn):
    x = torch.randn(4, 3, dtype=torch.float64)
    graph = captured(fn, x)
    simplify(graph)
    assert torch.equal(graph(x), fn(x))


def test_random_numbers_are_not_merged():
    x = torch.zeros(1000)
    graph = captured(lambda x: torch.randn_like(x) - torch.randn_like(x), x)
    simplify(graph)
    assert float(graph(x).std()) > 1.0


def test_written_operands_are_not_merged():
    def fn(x):
        a, b = x.exp(), x.exp()
        return a.add_(1.0) + b

    x = torch.randn(5, dtype=torch.float64)
    graph = captured(fn, x)
    simplify(graph)
    assert torch.equal(graph(x), fn(x))


def test_what_reads_memory_before_and_after_a_write_is_read_twice():
    """As log Z that moves within a training step, also under another name, and as views do."""
    log_z = torch.zeros(3, dtype=F64)
    alias = log_z.view(3)

    def fn(x):
        fresh = x.exp()
        view = fresh[1:]
        before = (x - alias).sum() + view.sum()
        log_z.add_(x.mean())
        fresh.add_(1.0)
        return before, (x - alias).sum() + view.sum()

    x = torch.randn(3, dtype=F64)
    graph = captured(fn, x)
    simplify(graph)
    found = []
    for step in (fn, graph):
        log_z.zero_()
        found.append([torch.stack(step(x)) for _ in range(2)])
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))
    assert not torch.equal(*found[0])


def test_the_rest_of_a_graph_that_writes_or_draws_is_simplified():
    count = torch.zeros((), dtype=F64)

    def fn(x):
        count.add_(1.0)
        return (x.exp() + x.exp()).detach() + torch.randn_like(x) * count

    x = torch.randn(5, dtype=F64)
    graph = captured(fn, x)
    simplify(graph)
    assert num_calls(graph) == 6  # exp, add, randn, mul, add, and the count
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = graph(x)
        count.sub_(1.0)
        torch.manual_seed(0)
        assert torch.equal(ours, fn(x))


def test_what_follows_from_shapes_alone_is_computed_once():
    def fn(x):
        steps = torch.arange(4.0) + torch.tensor(2.0)
        return x * torch.ones_like(x).mul(2.0).sum() - torch.full((4,), 3.0).log() * steps

    graph = captured(fn, torch.ones(4))
    simplify(graph)
    assert num_calls(graph) == 2  # one product, one difference
    x = torch.randn(4)
    assert torch.equal(graph(x), fn(x))


def test_neutral_numbers_are_dropped_where_nothing_else_changes():
    x = torch.arange(4)
    graph = captured(lambda x: (x + 0.0, x + 0, x.double() / 1 - 0.0, x * 1, x - 1), x)
    simplify(graph)
    assert num_calls(graph) == 3  # to floats, to doubles, and the difference
    for ours, wanted in zip(graph(x), (x.float(), x, x.double(), x, x - 1), strict=True):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)


def test_outputs_can_be_made_to_share_no_memory():
    weight = torch.ones(3)

    def fn(x):
        both = x.exp() + weight
        return [both, both, both[:2], x, weight, x.sin()]

    x = torch.randn(3)
    wanted, before = [part.clone() for part in fn(x)], x.clone()
    graph = captured(fn, x)
    simplify(graph)
    separate_outputs(graph)
    found = graph(x)
    for position, part in enumerate(found):
        part.mul_(position + 2.0)
    for position, (part, value) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(part, value * (position + 2.0))
    assert torch.equal(x, before)
    assert torch.equal(weight, torch.ones(3))


def test_constants_stay_live():
    weight = torch.ones(3)
    graph = captured(lambda x: x * weight + x * weight, torch.ones(3))
    simplify(graph)
    weight.mul_(5.0)
    assert torch.equal(graph(torch.ones(3)), torch.full((3,), 10.0))


def factorized(q):
    """A potential with the Cholesky factor of a matrix that is definite for q > 0 only."""
    with torch.enable_grad():
        leaf = q.detach().requires_grad_()
        matrix = torch.eye(3, dtype=q.dtype) * leaf[:, :, None] + 0.1
        factor = torch.linalg.cholesky(matrix)
        u = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        (grad,) = torch.autograd.grad(u.sum(), leaf)
    return u.detach(), grad


def test_a_factorization_that_fails_is_nan_for_its_chain_alone():
    q = torch.rand(5, 1, dtype=torch.float64) + 0.5
    wanted = factorized(q)
    graph = captured(factorized, q)
    let_factorizations_fail(graph)
    simplify(graph)
    for ours, theirs in zip(graph(q), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    q[2] = -3.0
    u, grad = graph(q)
    assert u.isnan().tolist() == [False, False, True, False, False]
    assert grad.isnan()[:, 0].tolist() == u.isnan().tolist()


def test_a_complex_factorization_that_fails_is_nan_too():
    def fn(q):
        return (torch.linalg.cholesky(torch.diag_embed(q) + 0j).abs().sum((1, 2)),)

    q = torch.ones(3, 2, dtype=torch.float64)
    graph = captured(fn, q)
    let_factorizations_fail(graph)
    q[1, 0] = -1.0
    assert graph(q)[0].isnan().tolist() == [False, True, False]


COLUMNS = torch.tensor([[1.0, 0.5], [0.0, 2.0], [-1.0, 1.0]], dtype=F64)
SINGULAR = {
    "inv": lambda a: torch.linalg.inv(a).sum((-2, -1)),
    "inverse": lambda a: a.inverse().sum((-2, -1)),
    "solve": lambda a: torch.linalg.solve(a, COLUMNS).sum((-2, -1)),
    "solve from the right": lambda a: torch.linalg.solve(a, COLUMNS.T, left=False).sum((-2, -1)),
    "solve one vector": lambda a: torch.linalg.solve(a, COLUMNS[:, 0]).sum(-1),
    "solve more systems": lambda a: torch.linalg.solve(a, COLUMNS.expand(2, 1, 3, 2)).sum(
        (0, 2, 3)
    ),
    "solve_ex": lambda a: torch.linalg.solve_ex(a, COLUMNS)[0].sum((-2, -1)),
    "lu_factor": lambda a: torch.linalg.lu_factor(a)[0].diagonal(dim1=-2, dim2=-1).log().sum(-1),
    "matrix_power": lambda a: torch.linalg.matrix_power(a, -2).sum((-2, -1)),
    "logdet": torch.logdet,
    "cholesky_inverse": lambda a: torch.cholesky_inverse(a.tril()).sum((-2, -1)),
    "checked": lambda a: torch.linalg.inv_ex(a, check_errors=True)[0].sum((-2, -1)),
}
FROM_WITHIN = ("cholesky_inverse", "checked")


def of_matrices(name, q):
    """A function of the matrices q I + 1/10 or, of a lower factor, q I + its lower half."""
    with torch.enable_grad():
        leaf = q.detach().requires_grad_()
        u = SINGULAR[name](
            torch.eye(3, dtype=q.dtype) * leaf[:, :, None] + leaf.sign()[..., None] / 10
        )
        (grad,) = torch.autograd.grad(u.sum(), leaf)
    return u.detach(), grad


@pytest.mark.parametrize("name", SINGULAR)
def test_a_singular_matrix_loses_its_chain_alone(name):
    """The values and gradients of the others are those that they have without it."""
    q = torch.rand(5, 1, dtype=F64) + 0.5
    wanted = of_matrices(name, q)
    graph = captured(lambda q: of_matrices(name, q), q)
    let_factorizations_fail(graph)
    simplify(graph)
    others = torch.tensor([0, 1, 3, 4])
    singular = q.clone()
    singular[2] = 0.0
    found = nan_where_it_fails(graph, singular, q + 1) if name in FROM_WITHIN else graph(singular)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours[others], theirs[others])
        assert not torch.isfinite(ours[2]).any()


def test_chains_survive_a_factorization_that_fails():
    """Long steps leave the region where the matrix is definite, and are rejected there."""

    def potential(values):
        scale = values["q"]
        factor = torch.linalg.cholesky(torch.eye(2) * scale + 0.1)
        return 0.5 * (scale - 1.0) ** 2 - 1e-3 * factor.diagonal().log().sum()

    kernel = RandomWalk(potential_fn=potential, step_size=5.0, adapt_step_size=False)
    mcmc = MCMC(kernel, 50, 0, num_chains=16, disable_progbar=True)
    mcmc.run(initial_params={"q": torch.rand(16) + 0.5})
    draws = mcmc.get_samples()["q"]
    assert float(draws.min()) > -0.2
    assert float(draws.std()) > 0.2


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.exp() + x.sin() + x.cos(),
        lambda x: (x - x.exp()) * (x.exp() - x) + (x - x.exp()),
        lambda x: torch.add(x, x.exp(), alpha=2) * torch.add(x, x.exp(), alpha=3),
        lambda x: x.sum(0) + x.sum(0, dtype=torch.float32),
        lambda x: x.pow(2) + x.pow(3) + x.pow(0.5),
        lambda x: x.neg().exp().neg() + x.neg(),
    ],
)
def test_operations_that_differ_are_not_merged(fn):
    x = torch.rand(4, 4, dtype=F64)
    graph = make_fx(fn)(x)
    simplify(graph)
    assert torch.equal(graph(x), fn(x))
