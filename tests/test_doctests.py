"""What docstrings, README and documentation show is run, and must come out as printed."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pyro
import pytest
import torch

import pyro_ebm

ROOT = Path(__file__).parent.parent
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
INDENTED_BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", re.MULTILINE)
ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
PYTHON_BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def modules_with_examples(package: Path) -> list[str]:
    """Returns the dotted names of the modules whose source holds a prompt."""
    files = [path for path in package.rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")]
    parts = [path.relative_to(package.parent).with_suffix("").parts for path in sorted(files)]
    return [".".join(part for part in names if part != "__init__") for names in parts]


def namespace() -> dict[str, Any]:
    """Returns the names that examples may use without importing them."""
    return {"torch": torch, "pyro": pyro, "dist": pyro.distributions, "ebm": pyro_ebm}


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Returns first line and text of every fenced Python block of a Markdown text."""
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in PYTHON_BLOCK.finditer(text)]


def run_block(block: str, line: int, filename: str, names: dict[str, Any]) -> None:
    """Runs one block in ``names``: with prompts its output is compared, without it is executed."""
    if ">>>" in block:
        example = doctest.DocTestParser().get_doctest(block, names, filename, filename, line - 1)
        example.globs = names  # the parser copies; later blocks shall see what this one defines
        results = doctest.DocTestRunner(optionflags=FLAGS).run(example, clear_globs=False)
        assert results.failed == 0, f"{filename}, line {line}: see the captured output"
    else:
        exec(compile("\n" * (line - 1) + block, filename, "exec"), names)


@pytest.mark.parametrize("name", modules_with_examples(ROOT / "pyro_ebm"))
def test_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs=namespace(), optionflags=FLAGS)
    assert results.attempted > 0
    assert results.failed == 0, "see the captured output"


def test_readme_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, block in blocks:
        run_block(block, line, "README.md", names)
    if not blocks:
        pytest.skip("README.md holds no Python block")


def run_page(page: str, names: dict[str, Any]) -> None:
    """Runs the Python blocks of a page of the documentation, one after the other."""
    text = (ROOT / "docs" / f"{page}.rst").read_text(encoding="utf-8")
    blocks = [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in INDENTED_BLOCK.finditer(text)]
    assert blocks
    for line, block in blocks:
        run_block(dedent(block), line, f"{page}.rst", names)


def test_the_page_on_the_guard_runs():
    """With a model of the reader's."""
    energy = pyro_ebm.energies.GaussianEnergy(torch.zeros(2), event_dim=1)

    def model(data: Any) -> None:
        with pyro.plate("data", len(data)):
            pyro.sample("x", pyro_ebm.EnergyDistribution(energy), obs=data)

    run_page("guard", {**namespace(), "model": model, "data": torch.randn(5, 2)})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning, on loggers and workers
def test_the_page_on_training_runs(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning.pytorch")
    monkeypatch.chdir(tmp_path)
    for name, value in ONE_PROCESS.items():
        monkeypatch.setenv(name, value)
    run_page("training", {"__name__": "__main__", "lightning": lightning})


def test_blocks_are_found_and_share_their_names():
    text = "Text\n```python\nx = 2\n```\n```sh\nls\n```\n```python\n>>> x + 1\n3\n>>> y = x\n```\n"
    blocks = python_blocks(text)
    assert [line for line, _ in blocks] == [3, 9]
    names: dict[str, Any] = {}
    for line, block in blocks:
        run_block(block, line, "text", names)
    assert names["y"] == 2


@pytest.mark.parametrize("block", [">>> 1 + 1\n3\n", "raise AssertionError('no')\n"])
def test_wrong_blocks_fail(block):
    with pytest.raises(AssertionError):
        run_block(block, 1, "text", {})
