"""Torch data parallelism: two processes with half of the rows each take the step of one with all.

Every process runs the objective as a torch module under ``DistributedDataParallel``; the contrast
belongs to the rows, so that both ways see the same draws. The comparison is of the gradients that
the optimizer gets, for losses that are means over rows. The bound of Donsker and Varadhan takes the
logarithm of a mean over all rows, and two processes know half of them each: they get the mean of
the gradients of the halves, which is another (biased) one.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._dynamo  # which the wrapper imports: once here, not in every process
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrepancy.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.divergences.kale import KALE, DonskerVaradhan
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.noise.nce import NCE, RankingNCE
from pyro_ebm.infer.score.denoising import DenoisingScoreMatching
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.infer.score.sliced import SlicedScoreMatching

NUM_ROWS, WORLD = 12, 2

FAMILIES = {
    "nce": NCE,
    "ranking": lambda: RankingNCE(num_noise=3),
    "score matching": ScoreMatching,
    "sliced": lambda: SlicedScoreMatching(num_projections=3),
    "denoising": lambda: DenoisingScoreMatching(noise_std=0.5),
    "cd": lambda: ContrastiveDivergence(2),
    "kale": lambda: KALE(c_update="gradient"),
    "kale, penalty": lambda: KALE(c_update="gradient", gradient_penalty=0.3),
    "dv": DonskerVaradhan,
    "ed": lambda: EnergyDiscrepancy(num_negatives=4),
}


class Model(nn.Module):
    """A network tilting a Gaussian; the last bias is a constant of the energy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 1), nn.Flatten(-2))

    def forward(self, x):
        base = dist.Normal(torch.zeros(2, dtype=x.dtype), 1.5).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(self.net, base=base, conditional=False), obs=x)


def no_guide(x):
    return None


def prepared(name, data, attach):
    """The objective of a model as a module, its draws tied to the rows, its log Z in place."""
    model, objective = Model(), FAMILIES[name]()
    if not isinstance(objective, ScoreMatching):
        base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        attach(objective, EnergyDistribution(model.net, base=base), data)
    module = objective(model, no_guide)
    with torch.no_grad():
        module(data)
    return module


def gradients(module, loss):
    """Gradients by name after a backward pass; zeros for what the loss does not reach."""
    module.zero_grad()
    loss.backward()
    named = module.named_parameters()
    return {
        n.removeprefix("module."): p.grad.clone() if p.grad is not None else torch.zeros_like(p)
        for n, p in named
        if p.requires_grad
    }


def worker(rank, modules, data, folder):
    """Two steps of every family in one of the processes, with every second row."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    found = {}
    rows = data[rank::WORLD]
    for name, module in modules.items():
        parallel = DistributedDataParallel(module, find_unused_parameters=True)
        for _ in range(2):  # the second forward pass finds out about reductions left undone
            found[name] = gradients(parallel, parallel(rows) / len(rows))
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()  # none leaves while the other needs it
    os._exit(0)  # torch joins its threads while it holds the lock that one of them may wait for


@pytest.fixture
def families(attach):
    data = torch.randn(NUM_ROWS, 2)
    return data, {name: prepared(name, data, attach) for name in FAMILIES}


@pytest.fixture
def synchronised(families, tmp_path):
    """The gradients that each of two processes holds after its backward pass."""
    data, modules = families
    context = multiprocessing.get_context("fork")  # torch and Pyro need not be imported again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 advises against fork
        processes = [
            context.Process(target=worker, args=(rank, modules, data, str(tmp_path)))
            for rank in range(WORLD)
        ]
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * WORLD
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


TORCHRUN = """
import os, torch, pyro
import pyro.distributions as dist
from torch.nn.parallel import DistributedDataParallel
from pyro_ebm import EnergyDistribution
from pyro_ebm.infer import NCE

torch.manual_seed(0)
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.precision = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            energy = EnergyDistribution(lambda y: 0.5 * self.precision * y**2, event_shape=())
            pyro.sample("x", energy, obs=x)

data = torch.randn(4000)
rows, model = data[rank::world], Model()
module = NCE(num_noise=4, noise=dist.Normal(0.0, 1.5))(model, lambda x: None)
with torch.no_grad():
    module(rows)
parallel = DistributedDataParallel(module, find_unused_parameters=True)
optimizer = torch.optim.Adam(parallel.parameters(), lr=0.05)
torch.manual_seed(rank)  # every process draws noise of its own
for _ in range(150):
    optimizer.zero_grad()
    (parallel(rows) / len(rows)).backward()
    optimizer.step()
found = [None] * world
torch.distributed.all_gather_object(found, model.precision.item())
assert found[0] == found[1], found
assert abs(found[0] * data.var().item() - 1.0) < 0.15, found
torch.distributed.barrier()
os._exit(0)  # torch joins its threads while it holds the lock that one of them may wait for
"""


@pytest.mark.slow
def test_torchrun_trains_one_model(tmp_path):
    """Both processes end with the same parameter, that of the pooled data.

    Its standard error is about 0.03 (a Gaussian's precision from 4000 rows, and the noise's share);
    with half of the data's gradients lost, or not averaged, the processes differ.
    """
    script = tmp_path / "train.py"
    script.write_text(TORCHRUN)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]


def test_two_processes_take_the_step_of_one(families, synchronised):
    data, modules = families
    for name, module in modules.items():
        whole = gradients(module, module(data) / len(data))
        halves = [gradients(module, module(rows) / len(rows)) for rows in (data[::2], data[1::2])]
        assert all(whole[key].any() for key in whole if not key.endswith("net.2.bias"))
        assert ("elbo.log_normalizers.x" in whole) == (name in ("nce", "kale", "kale, penalty"))
        for key, value in whole.items():
            mean = (halves[0][key] + halves[1][key]) / 2
            want = mean if name == "dv" else value
            for of_rank in synchronised:
                torch.testing.assert_close(of_rank[name][key], want, rtol=0, atol=1e-10)
        unlike = max((whole[k] - (halves[0][k] + halves[1][k]) / 2).abs().max() for k in whole)
        assert (unlike > 1e-4) == (name == "dv")
