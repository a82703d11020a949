"""Makes ``record.npz`` and ``expected.json``: a recorded run, and what ArviZ 0.x makes of it.

Run once, where torch, Pyro and ArviZ 0.x are installed: ``python tests/arviz1/make_record.py``. The
tests beside it read the two files where only NumPy and ArviZ 1.x are.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC

from pyro_ebm.chains import Record, bfmi, summary, to_arviz
from pyro_ebm.chains.arviz import import_arviz
from pyro_ebm.mcmc import RecordingNUTS

HERE = Path(__file__).parent
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)


def model(y: torch.Tensor) -> None:
    """Normal means with a common spread."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(10.0).double()))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("group/theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 12.0), obs=y)


def main() -> None:
    """Runs the sampler and writes both files."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pyro.set_rng_seed(0)
    kernel = RecordingNUTS(model, max_tree_depth=4)
    mcmc = MCMC(kernel, 100, 100, num_chains=4, disable_progbar=True)
    mcmc.run(Y)
    data = to_arviz(mcmc, log_likelihood=True)
    record = Record.from_mcmc(mcmc)
    record.attrs["y"] = Y.tolist()
    record.save(HERE / "record.npz")
    expected = {
        "summary": json.loads(summary(record).to_json(orient="index", double_precision=15)),
        "bfmi": list(bfmi(record.sample_stats["energy"])),
        "elpd_loo": float(import_arviz().loo(data)["elpd_loo"]),
        "log_likelihood_total": float(np.sum(data["log_likelihood"]["y"].values)),
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
