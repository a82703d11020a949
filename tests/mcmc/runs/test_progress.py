"""What the progress bar says."""

import torch

from pyro_ebm.mcmc import State
from pyro_ebm.mcmc.runs import progress
from pyro_ebm.mcmc.runs.progress import Progress
from pyro_ebm.ops.rank_rhat import rank_rhat


class Bar:
    """A bar that remembers."""

    def __init__(self, *, disable=False):
        self.disable = disable
        self.description, self.number, self.texts = "", 0, []

    def set_description(self, text):
        self.description = text

    def update(self):
        self.number += 1

    def set_postfix_str(self, text, *, refresh):
        self.texts.append(text)


def state():
    q = torch.zeros(4, 1)
    return State(q, q[:, 0], q, {"step_size": torch.tensor([[0.25], [0.5], [0.5], [1.0]])})


INFO = {
    "acceptance_rate": torch.tensor([0.5, 0.5, 1.0, 1.0]),
    "diverging": torch.tensor([True, False, True, False]),
}


def test_acceptance_step_size_and_divergences_so_far(monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", -1.0)
    bar = Bar()
    show = Progress(bar, "warmup")
    for _ in range(3):
        show(state(), INFO)
    assert (bar.description, bar.number) == ("warmup", 3)
    assert bar.texts[0] == "acceptance 0.75, step 5.00e-01, divergences 2"
    assert bar.texts[2].endswith("divergences 6")


def test_the_text_is_renewed_now_and_then_only():
    bar = Bar()
    show = Progress(bar, "warmup")
    for _ in range(3):
        show(state(), INFO)
    assert (bar.number, len(bar.texts)) == (3, 1)


def test_rhat_is_of_the_draws_so_far(monkeypatch):
    """Of at most 64 chains and some 200 draws, evenly spaced."""
    monkeypatch.setattr(progress, "_EVERY", -1.0)
    torch.manual_seed(2)
    lp = torch.randn(70, 450) + torch.arange(70.0)[:, None]
    draws = [None, lp[:, :7], lp[:4, :8], lp]
    bar = Bar()
    show = Progress(bar, "sample", lambda: draws[len(bar.texts)])
    for _ in draws:
        show(State(lp, lp[:, 0], lp), {})
    few, many = float(rank_rhat(lp[:4, :8].T)), float(rank_rhat(lp[:64, ::3].T))
    assert bar.texts == ["", "", f"R-hat of lp {few:.2f}", f"R-hat of lp {many:.2f}"]


def test_a_bar_that_is_hidden_costs_no_text():
    bar = Bar(disable=True)
    Progress(bar, "sample", lambda: 1 / 0)(state(), INFO)
    assert (bar.number, bar.texts) == (1, [])
