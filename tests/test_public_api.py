"""Public names exist, say what they are, and stand in the reference."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api.rst"

NAMESPACES = (
    "pyro_ebm",
    "pyro_ebm.chains",
    "pyro_ebm.datasets",
    "pyro_ebm.distributions",
    "pyro_ebm.energies",
    "pyro_ebm.errors",
    "pyro_ebm.infer",
    "pyro_ebm.mcmc",
    "pyro_ebm.models",
    "pyro_ebm.normalizers",
    "pyro_ebm.plots",
    "pyro_ebm.poutine",
    "pyro_ebm.testing",
    "pyro_ebm.typing",
)
INTERNAL = ("pyro_ebm.ops", "pyro_ebm.settings")
ENTRY = re.compile(
    r"^ *\.\. auto(?:class|data|exception|function|module):: +([\w.]+) *$", re.MULTILINE
)


def exists(dotted: str) -> bool:
    """Returns whether a module of this name has a file; a folder without ``__init__`` has none."""
    try:
        spec = importlib.util.find_spec(dotted)
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None


def locate(dotted: str) -> Any:
    """Returns the attribute or module of a dotted name; a function may share its file's name."""
    parent, _, name = dotted.rpartition(".")
    if parent and hasattr(importlib.import_module(parent), name):
        return getattr(importlib.import_module(parent), name)
    return importlib.import_module(dotted)


def public_names(module: types.ModuleType) -> list[str]:
    """Returns ``__all__``, or where a single file has none the classes and functions it defines."""
    if hasattr(module, "__all__") or hasattr(module, "__path__"):
        return list(module.__all__)
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]


def undocumented(module: types.ModuleType, text: str) -> list[str]:
    """Returns the public names of a module whose object no entry of the reference shows.

    One entry serves every name of an object: a headline name is documented where it lives.
    """
    shown = [locate(name) for name in ENTRY.findall(text)]
    return [
        name
        for name in public_names(module)
        if not any(getattr(module, name) is thing for thing in shown)
    ]


def entry_for(module: types.ModuleType, name: str) -> str:
    """Returns the lines of the reference that show a name."""
    thing = getattr(module, name)
    if inspect.ismodule(thing):
        return f".. automodule:: {thing.__name__}"
    kind, option = "data", ""
    if inspect.isroutine(thing):
        kind = "function"
    elif inspect.isclass(thing):
        is_error = issubclass(thing, BaseException)
        kind, option = ("exception", "") if is_error else ("class", "\n   :members:")
    return f".. auto{kind}:: {module.__name__}.{name}{option}"


def nameless(module: types.ModuleType) -> list[str]:
    """Returns the public classes, functions and modules that have no docstring of their own."""
    return [
        name
        for name in public_names(module)
        if is_describable(getattr(module, name)) and not getattr(module, name).__doc__
    ]


def is_describable(thing: Any) -> bool:
    """Returns whether Python keeps a docstring for this kind of object."""
    return inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)


PRESENT = [name for name in NAMESPACES if exists(name)]


def test_every_part_of_the_package_is_public_or_internal():
    files = {path.stem for path in (ROOT / "pyro_ebm").glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (ROOT / "pyro_ebm").glob("*/__init__.py")}
    assert {f"pyro_ebm.{name}" for name in files | folders} <= {*NAMESPACES, *INTERNAL}


@pytest.mark.parametrize("namespace", PRESENT)
def test_public_names_exist_once_and_have_docstrings(namespace):
    module = importlib.import_module(namespace)
    names = public_names(module)
    assert names
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []
    assert nameless(module) == []


@pytest.mark.parametrize("namespace", PRESENT)
def test_reference_shows_every_public_name(namespace):
    module = importlib.import_module(namespace)
    missing = undocumented(module, API.read_text(encoding="utf-8"))
    entries = "\n\n".join(entry_for(module, name) for name in missing)
    assert missing == [], f"docs/api.rst lacks these entries:\n\n{entries}\n"


def test_reference_has_no_dead_and_no_double_entry():
    entries = ENTRY.findall(API.read_text(encoding="utf-8"))
    assert len(set(entries)) == len(entries)
    for entry in entries:
        assert locate(entry) is not None


def test_a_forgotten_name_is_found():
    module = types.ModuleType("module")
    module.__all__ = ["Shown", "forgotten"]
    module.Shown = locate("pyro_ebm.errors.MissingNormalizerError")
    module.forgotten = lambda: None
    text = ".. autoexception:: pyro_ebm.errors.MissingNormalizerError\n   :members:\n"
    assert undocumented(module, text) == ["forgotten"]
    assert undocumented(module, "") == ["Shown", "forgotten"]
    assert nameless(module) == ["forgotten"]
    assert entry_for(module, "forgotten") == ".. autofunction:: module.forgotten"
