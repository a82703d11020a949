"""Negative twins: the shipped code with one bug planted must make the named test fail.

A test that passes on wrong code proves nothing. The list is ``twins.toml``, beside this file.
"""

from __future__ import annotations

import ast
import functools
import os
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fork_server import ForkServer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tests" / "twins.toml"
TIMEOUT = 300  # seconds for one run of one test

# Loaded into the inner run: stops it, with pytest's code 4, where it would test the installed code
# or where the edited module cannot even be imported.
GATE = """
import importlib
from pathlib import Path
import pytest

def pytest_configure(config):
    try:
        module = importlib.import_module({module!r})
    except BaseException as error:
        raise pytest.UsageError(f"cannot import the edited module: {{error!r}}") from error
    if not Path(module.__file__).is_relative_to(Path(__file__).parent):
        raise pytest.UsageError(f"the copy is not what is imported, but {{module.__file__}}")
"""


@dataclass(frozen=True)
class Twin:
    """One edit of a shipped file, and the tests of which each must notice it."""

    file: str
    function: str
    old: str
    new: str
    test: str | tuple[str, ...]

    @property
    def tests(self) -> tuple[str, ...]:
        return (self.test,) if isinstance(self.test, str) else tuple(self.test)

    @property
    def label(self) -> str:
        return f"{Path(self.file).stem}.{self.function}"

    @property
    def module(self) -> str:
        return ".".join(Path(self.file).with_suffix("").parts).removesuffix(".__init__")

    def edit(self, source: str) -> str:
        """Returns the source with the bug in it."""
        assert source.count(self.old) == 1, (
            f"{self.file}: {source.count(self.old)} times {self.old}"
        )
        assert self.new != self.old
        return source.replace(self.old, self.new)


@dataclass(frozen=True)
class Outcome:
    """What an inner run of pytest came to."""

    code: int
    failures: int
    errors: int
    output: str

    @property
    def failed(self) -> bool:
        """Whether a test ran and failed, as opposed to a file that could not be imported."""
        return self.code == 1 and self.failures > 0 and self.errors == 0


def read_twins(text: str) -> list[Twin]:
    """Returns the entries of a list; an unknown or missing key is a TypeError."""
    return [Twin(**entry) for entry in tomllib.loads(text).get("twin", [])]


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yields the qualified name and the node of every function and class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node
            yield from definitions(node, f"{prefix}{node.name}.")
        else:
            yield from definitions(node, prefix)


def holds(source: str, function: str, text: str) -> bool:
    """Returns whether ``text`` starts inside the named function; "" stands for the whole module."""
    line = source.count("\n", 0, source.index(text) + len(text) - len(text.lstrip())) + 1
    spans = [
        (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno)
        for name, node in definitions(ast.parse(source))
        if name == function
    ]
    return not function or any(first <= line <= last for first, last in spans)


def defines_test(node_id: str) -> bool:
    """Returns whether the file of a node id exists and defines its test."""
    file, *names = node_id.split("[")[0].split("::")
    path = ROOT / file
    if not path.is_file() or not names:
        return False
    return ".".join(names) in dict(definitions(ast.parse(path.read_text(encoding="utf-8"))))


def run_tests(tests: tuple[str, ...], twin: Twin | None = None) -> Outcome:
    """Runs tests against a copy of the package, with the twin's bug planted in it."""
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(
            ROOT / "pyro_ebm", copy / "pyro_ebm", ignore=shutil.ignore_patterns("__pycache__")
        )
        write_gate(copy, twin.module if twin else "pyro_ebm")
        if twin is not None:
            path = copy / twin.file
            path.write_text(twin.edit(path.read_text(encoding="utf-8")), encoding="utf-8")
        return run_pytest(tests, copy)


def write_gate(copy: Path, module: str) -> None:
    """Writes the plugin that checks the inner run before its tests."""
    (copy / "twin_gate.py").write_text(GATE.format(module=module), encoding="utf-8")


@functools.cache
def server() -> ForkServer:
    """Returns this process's server."""
    environment = {k: value for k, value in os.environ.items() if not k.startswith("PYTEST_")}
    return ForkServer(
        environment | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    )


def run_pytest(tests: tuple[str, ...], copy: Path) -> Outcome:
    """Runs pytest in another process that finds the package in ``copy`` first."""
    report = copy / "report.xml"
    arguments = ["-q", "-x", "-m", "", f"--junitxml={report}"]
    arguments += ["-p", "twin_gate", "-p", "no:cacheprovider", "-p", "no:xdist"]
    arguments += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    arguments += [str(ROOT / test) for test in tests]
    code, output = server().run(arguments, copy, TIMEOUT)
    return Outcome(code, *counts(report), output[-4000:])


def counts(report: Path) -> tuple[int, int]:
    """Returns how many tests failed and how many could not start."""
    if not report.is_file():
        return 0, 0
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    return sum(int(s.get("failures", 0)) for s in suites), sum(
        int(s.get("errors", 0)) for s in suites
    )


@functools.cache
def run_unedited(test: str) -> Outcome:
    """Runs a test on an unchanged copy, once per process."""
    return run_tests((test,))


TWINS = read_twins(LIST.read_text(encoding="utf-8"))


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.label)
def test_entry_fits_the_code(twin):
    source = (ROOT / twin.file).read_text(encoding="utf-8")
    ast.parse(twin.edit(source))
    assert holds(source, twin.function, twin.old)
    assert twin.tests
    assert [test for test in twin.tests if not defines_test(test)] == []


@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.label)
def test_planted_bug_is_noticed(twin):
    for test in twin.tests:
        control = run_unedited(test)
        assert control.code == 0, f"fails without the bug: {test}\n{control.output}"
        outcome = run_tests((test,), twin)
        assert outcome.failed, f"does not notice the bug: {test}\n{outcome.output}"


def entry(**changes: str) -> Twin:
    """Returns an entry that plants nothing of consequence."""
    fields = {
        "file": "pyro_ebm/settings.py",
        "function": "missing_normalizer_policy",
        "old": "return MISSING_NORMALIZER",
        "new": "return str(MISSING_NORMALIZER)",
        "test": "tests/test_twins.py::test_list_is_read",
    }
    return Twin(**{**fields, **changes})


def test_list_is_read():
    text = '[[twin]]\nfile="a"\nfunction="f"\nold="x"\nnew="y"\ntest=["t::a", "t::b"]\n'
    (twin,) = read_twins(text)
    assert twin.tests == ("t::a", "t::b")
    with pytest.raises(TypeError):
        read_twins(text.replace("old=", "odl="))


def test_entries_that_do_not_fit_are_refused():
    source = "class A:\n    def f(self):\n        return 1\n\n\ndef g():\n    return 2\n"
    assert holds(source, "A.f", "return 1")
    assert not holds(source, "g", "return 1")
    assert not holds(source, "f", "return 1")
    with pytest.raises(AssertionError, match="2 times"):
        entry(old="return").edit(source)
    with pytest.raises(AssertionError, match="0 times"):
        entry(old="yield").edit(source)
    assert defines_test("tests/test_twins.py::test_list_is_read[x]")
    assert not defines_test("tests/test_twins.py::test_gone")
    assert not defines_test("tests/gone.py::test_list_is_read")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        pytest.param({}, 0, id="an edit without effect"),
        pytest.param({"new": "return ("}, 4, id="an edit that cannot be imported"),
        pytest.param({"test": "tests/test_twins.py::test_gone"}, 4, id="a test that is not there"),
    ],
)
def test_only_a_failing_test_counts(changes, code):
    twin = entry(**changes)
    outcome = run_tests(twin.tests, twin)
    assert outcome.code == code
    assert not outcome.failed


@pytest.mark.slow
def test_copy_wins_over_the_installed_package():
    with TemporaryDirectory() as folder:
        write_gate(Path(folder), "pyro_ebm")
        outcome = run_pytest(("tests/test_twins.py::test_list_is_read",), Path(folder))
    assert outcome.code != 0
    assert not outcome.failed
