"""An objective in a Lightning loop: a few lines, and the same parameters as in a loop of torch."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrepancy.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.noise.nce import NCE
from pyro_ebm.infer.score.score_matching import ScoreMatching

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports what others have deprecated
    lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning")

OBJECTIVES = {"nce": NCE, "ed": EnergyDiscrepancy, "score matching": ScoreMatching}
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 1), nn.Flatten(-2))

    def forward(self, x):
        base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(self.net, base=base, conditional=False), obs=x)


class Training(lightning.LightningModule):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def training_step(self, batch, index):
        torch.manual_seed(self.global_step)  # loaders draw from the same generator
        return self.loss(batch) / len(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.loss.parameters(), lr=0.02)


def prepared(name, data):
    module = OBJECTIVES[name]()(Model(), lambda x: None)
    torch.manual_seed(1)
    with torch.no_grad():
        module(data[:4])
    return module


@pytest.mark.filterwarnings("ignore")  # Lightning has much to say of loaders on few processors
@pytest.mark.parametrize("name", OBJECTIVES)
def test_lightning_reaches_the_parameters_of_a_torch_loop(name):
    data = torch.randn(12, 2)
    by_lightning = prepared(name, data)
    trainer = lightning.Trainer(max_epochs=3, **QUIET)
    trainer.fit(Training(by_lightning), DataLoader(data, batch_size=4))
    by_hand = prepared(name, data)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.02)
    for step, batch in enumerate([*data.split(4)] * 3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (by_hand(batch) / len(batch)).backward()
        optimizer.step()
    moved = dict(Model().net.named_parameters())
    for key, value in by_hand.named_parameters():
        have = by_lightning.get_parameter(key)
        torch.testing.assert_close(have, value, rtol=0, atol=1e-12)
        if key.endswith("weight"):
            assert not torch.equal(value, moved[key.removeprefix("model.net.")])
