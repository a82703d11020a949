"""The shape of the package, read from its source: imports run one way, files stay small."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pyro_ebm"
ROOT = "pyro_ebm"

# A unit may import units of a lower rank, and within the lowest rank any other.
RANKS = (
    ("typing", "errors", "settings"),
    ("ops",),
    ("energies", "datasets"),
    ("distributions",),
    ("poutine",),
    ("chains",),
    ("mcmc.targets",),
    ("mcmc.kernels",),
    ("mcmc.runs",),
    ("mcmc.exchange",),
    ("mcmc",),  # the folder's own __init__
    ("normalizers",),
    ("infer.scoring",),
    (
        "infer.likelihood",
        "infer.noise",
        "infer.score",
        "infer.divergences",
        "infer.discrepancy",
        "infer.discrete",
    ),
    ("infer.training", "infer.bayes"),
    ("infer",),  # the folder's own __init__
    ("models",),
    ("plots",),
    ("",),  # the root's own __init__
    ("testing",),
)
RANK = {unit: rank for rank, units in enumerate(RANKS) for unit in units}
LAZY_MODULES = {
    f"{ROOT}.chains.arviz",
    f"{ROOT}.plots",
    f"{ROOT}.datasets",
    f"{ROOT}.ops.swendsen_wang",  # SciPy's sparse matrices change the warning filters
}
ONLY_IMPORTER = {"arviz": f"{ROOT}.chains.arviz", "matplotlib": f"{ROOT}.plots"}
MAX_MODULE_LINES = 500
MAX_BARE_FUNCTION_LINES = 60

Sources = dict[str, str]
ImportNode = ast.Import | ast.ImportFrom


def read_package(package: Path) -> Sources:
    """Returns every module's source by dotted name; a package stands for its ``__init__``."""
    sources = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


def packages(sources: Sources) -> set[str]:
    """Returns the modules that have modules below them; the root always counts."""
    return {name.rpartition(".")[0] for name in sources} - {""} | {ROOT}


def imported_names(node: ImportNode, module: str, is_package: bool) -> Iterator[str]:
    """Yields the dotted names that one import statement asks for, relative ones resolved."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    prefix = node.module or ""
    if node.level:
        parts = module.split(".")
        above = parts[: len(parts) - node.level + is_package]
        prefix = ".".join([*above, *filter(None, [node.module])])
    yield from (f"{prefix}.{alias.name}" for alias in node.names)


def all_imports(sources: Sources, module: str) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of all that ``module`` imports, wherever the statement stands."""
    is_package = module in packages(sources)
    for node in ast.walk(ast.parse(sources[module])):
        if isinstance(node, ImportNode):
            for name in imported_names(node, module, is_package):
                yield node.lineno, name


def resolve(name: str, sources: Sources) -> str | None:
    """Returns the module of ours that ``name`` is or is in; None for other packages."""
    while name:
        if name in sources:
            return name
        name = name.rpartition(".")[0]
    return None


def internal_edges(sources: Sources) -> Iterator[tuple[str, int, str]]:
    """Yields importer, line and imported module for every import inside the package."""
    for module in sources:
        for line, name in all_imports(sources, module):
            target = resolve(name, sources)
            if target is not None:
                yield module, line, target


def unit_of(module: str) -> str:
    """Returns the file or folder that a module belongs to: one below the root, or two of these."""
    parts = module.removeprefix(ROOT).lstrip(".").split(".")
    inner = ".".join(parts[:2])
    return inner if inner in RANK else parts[0]


def unknown_units(sources: Sources) -> list[str]:
    """Finds files and folders that the order of imports does not mention."""
    units = sorted({unit_of(module) for module in sources})
    return [f"{unit}: has no place in the order of imports" for unit in units if unit not in RANK]


def wrong_edges(sources: Sources) -> list[str]:
    """Finds imports against the order."""
    return [
        f"{module}:{line} imports {target}"
        for module, line, target in internal_edges(sources)
        if not edge_is_allowed(unit_of(module), unit_of(target))
    ]


def edge_is_allowed(importer: str, imported: str) -> bool:
    """Returns whether one unit may import another one; unknown units are reported elsewhere."""
    if importer == imported or importer not in RANK or imported not in RANK:
        return True
    lowest = RANK[importer] == RANK[imported] == 0
    return lowest or RANK[imported] < RANK[importer]


def cycles(sources: Sources) -> list[str]:
    """Finds a cycle between modules, if there is one."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for module, _, target in internal_edges(sources):
        graph[module].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def hidden_imports(sources: Sources) -> list[str]:
    """Finds imports inside functions and by name at run time, except where they are allowed."""
    found = []
    for module in sorted(set(sources) - LAZY_MODULES):
        tree = ast.parse(sources[module])
        lines = {node.lineno for node in imports_in_functions(tree)}
        lines |= {node.lineno for node in ast.walk(tree) if is_import_call(node)}
        found += [f"{module}:{line} imports late" for line in sorted(lines)]
    return found


def imports_in_functions(tree: ast.Module) -> Iterator[ImportNode]:
    """Yields the import statements that run when a function is called."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (node for node in ast.walk(function) if isinstance(node, ImportNode))


def is_import_call(node: ast.AST) -> bool:
    """Returns whether a node calls ``import_module`` or ``__import__`` under any prefix."""
    if not isinstance(node, ast.Call):
        return False
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return called in ("import_module", "__import__")


def stray_importers(sources: Sources) -> list[str]:
    """Finds modules that import ArviZ or matplotlib without being the one that may."""
    return [
        f"{module}:{line} imports {name}"
        for module in sources
        for line, name in all_imports(sources, module)
        if ONLY_IMPORTER.get(name.split(".")[0], module) != module
    ]


def bare_modules(sources: Sources) -> list[str]:
    """Finds modules without a docstring."""
    return [module for module, text in sources.items() if not ast.get_docstring(ast.parse(text))]


def long_modules(sources: Sources) -> list[str]:
    """Finds modules that should be two."""
    counts = {module: text.count("\n") for module, text in sources.items()}
    return [f"{name}: {count} lines" for name, count in counts.items() if count > MAX_MODULE_LINES]


def long_bare_functions(sources: Sources) -> list[str]:
    """Finds long functions that do not say what they do."""
    return [
        f"{module}:{node.lineno} {node.name}"
        for module, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_BARE_FUNCTION_LINES
        and not ast.get_docstring(node)
    ]


RULES = (
    unknown_units,
    wrong_edges,
    cycles,
    hidden_imports,
    stray_importers,
    bare_modules,
    long_modules,
    long_bare_functions,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_rule(rule):
    sources = read_package(PACKAGE)
    assert f"{ROOT}.ops.log_normalizer" in sources
    assert rule(sources) == []


def clean_package() -> Sources:
    """Returns a small package that keeps every rule."""
    return {
        ROOT: '"""Root."""\nfrom pyro_ebm.infer import NCE\n',
        f"{ROOT}.errors": '"""Errors."""\n',
        f"{ROOT}.settings": '"""Settings."""\nfrom pyro_ebm import errors\n',
        f"{ROOT}.ops": '"""Ops."""\n',
        f"{ROOT}.ops.weights": '"""Weights."""\nfrom pyro_ebm.errors import Bad\n',
        f"{ROOT}.energies": '"""Energies."""\nfrom pyro_ebm.energies.base import Energy\n',
        f"{ROOT}.energies.base": '"""Base."""\nimport torch\nfrom pyro_ebm.ops import weights\n',
        f"{ROOT}.energies.neural": '"""Nets."""\nfrom .base import Energy\n',
        f"{ROOT}.datasets": '"""Data."""\nfrom pyro_ebm.ops.weights import ess\n',
        f"{ROOT}.chains": '"""Chains."""\n',
        f"{ROOT}.chains.arviz": '"""ArviZ."""\ndef convert():\n    import arviz\n',
        f"{ROOT}.infer": '"""Infer."""\nfrom pyro_ebm.infer.noise.nce import NCE\n',
        f"{ROOT}.infer.noise": '"""Noise."""\n',
        f"{ROOT}.infer.noise.nce": '"""NCE."""\nfrom pyro_ebm.energies import Energy\n',
        f"{ROOT}.infer.score": '"""Score."""\n',
        f"{ROOT}.infer.score.sliced": '"""Sliced."""\n',
        f"{ROOT}.plots": '"""Plots."""\ndef show():\n    import matplotlib.pyplot as plt\n',
        f"{ROOT}.testing": '"""Testing."""\nfrom pyro_ebm import NCE\n',
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_is_silent_on_a_clean_package(rule):
    assert rule(clean_package()) == []


LONG_BODY = "\n    x = 1" * MAX_BARE_FUNCTION_LINES
PLANTED = {
    "upwards": (wrong_edges, "energies.base", "from pyro_ebm.infer.noise.nce import NCE"),
    "upwards, plain import": (
        wrong_edges,
        "energies.base",
        "import pyro_ebm.infer.noise.nce as nce",
    ),
    "sideways, in a folder": (
        wrong_edges,
        "infer.noise.nce",
        "from pyro_ebm.infer.score import sliced",
    ),
    "upwards, relative": (wrong_edges, "energies.base", "from ..infer import nce"),
    "upwards, from a package": (wrong_edges, "energies", "from ..infer import nce"),
    "upwards, of a whole package": (wrong_edges, "ops.weights", "from pyro_ebm import energies"),
    "upwards, for types only": (
        wrong_edges,
        "ops.weights",
        "if TYPE_CHECKING:\n    from pyro_ebm.energies import Energy",
    ),
    "upwards, in a function": (
        wrong_edges,
        "chains.arviz",
        "def f():\n    from pyro_ebm.infer import NCE",
    ),
    "upwards, from the lowest": (wrong_edges, "settings", "from pyro_ebm.ops import weights"),
    "sideways": (wrong_edges, "energies.base", "from pyro_ebm.datasets import moons"),
    "sideways, back": (wrong_edges, "datasets", "from pyro_ebm.energies import Energy"),
    "the root": (wrong_edges, "infer.noise.nce", "from pyro_ebm import something"),
    "testing": (wrong_edges, "plots", "from pyro_ebm.testing import check"),
    "testing, from the root": (wrong_edges, "", "from pyro_ebm import testing"),
    "cycle of two": (cycles, "energies.base", "from pyro_ebm.energies.neural import MLP"),
    "cycle through a package": (cycles, "energies.base", "from pyro_ebm.energies import MLP"),
    "cycle in the lowest": (cycles, "errors", "from pyro_ebm.settings import policy"),
    "itself": (cycles, "infer.noise.nce", "from pyro_ebm.infer.noise.nce import NCE"),
    "function": (hidden_imports, "ops.weights", "def f():\n    import math"),
    "async function": (hidden_imports, "ops.weights", "async def f():\n    import math"),
    "method": (hidden_imports, "ops.weights", "class A:\n  def f(self):\n    from a import b"),
    "import_module": (hidden_imports, "", "import importlib\nm = importlib.import_module('a')"),
    "bare import_module": (hidden_imports, "", "m = import_module('a')"),
    "__import__": (hidden_imports, "chains", "m = __import__('a')"),
    "arviz": (stray_importers, "chains", "import arviz as az"),
    "part of arviz": (stray_importers, "plots", "from arviz.stats import rhat"),
    "matplotlib": (stray_importers, "chains.arviz", "import matplotlib.pyplot as plt"),
    "part of matplotlib": (stray_importers, "datasets", "from matplotlib import cm"),
    "long module": (long_modules, "datasets", "x = 1\n" * MAX_MODULE_LINES),
    "long function": (long_bare_functions, "datasets", f"def f():{LONG_BODY}"),
    "long method": (long_bare_functions, "datasets", f"class A:\n   def f(self):{LONG_BODY}"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_rule_flags_what_it_forbids(name):
    rule, module, planted = PLANTED[name]
    sources = clean_package()
    full_name = f"{ROOT}.{module}".rstrip(".")
    sources[full_name] += textwrap.dedent(planted) + "\n"
    findings = rule(sources)
    assert len(findings) >= 1
    assert all(full_name in finding for finding in findings)


def test_rule_flags_a_new_unit_and_a_module_without_docstring():
    sources = {**clean_package(), f"{ROOT}.utils": "x = 1\n"}
    assert unknown_units(sources) == ["utils: has no place in the order of imports"]
    assert bare_modules(sources) == [f"{ROOT}.utils"]


def test_long_function_with_docstring_passes():
    sources = {f"{ROOT}.ops": f'def f():\n    """Says what it does."""{LONG_BODY}\n'}
    assert long_bare_functions(sources) == []


IMPORT_PROBE = """
import random, sys, warnings
import numpy, torch, pyro, pyro.distributions, pyro.infer, pyro.poutine
from torch.distributions import Distribution

torch.set_default_dtype(torch.float64)
assert "arviz" not in sys.modules and "matplotlib" not in sys.modules

def state():
    settings = pyro.settings.get()
    settings.pop("ebm_missing_normalizer", None)
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch validation": Distribution._validate_args,
        "pyro settings": settings,
        "torch RNG": torch.get_rng_state().tolist(),
        "numpy RNG": repr(numpy.random.get_state()),
        "python RNG": random.getstate(),
        "numpy errors": numpy.geterr(),
        "numpy printing": repr(numpy.get_printoptions()),
        "warning filters": [repr(f) for f in warnings.filters],
        "excepthook": sys.excepthook,
        "handlers": list(pyro.poutine.runtime._PYRO_STACK),
        "parameters": list(pyro.get_param_store().keys()),
    }

before = state()
{import_line}
after = state()
print([name for name in before if before[name] != after[name]])
print(sorted({"arviz", "matplotlib", "sklearn", "scipy.stats"} & set(sys.modules)))
"""


def probe(import_line: str) -> list[str]:
    """Returns which global state an import changes, and which heavy packages it pulls in."""
    code = IMPORT_PROBE.replace("{import_line}", import_line)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_import_changes_nothing_global():
    line = "import pyro_ebm; assert 'ebm_missing_normalizer' in pyro.settings.get()"
    assert probe(line) == ["[]", "[]"]


def test_probe_sees_what_an_import_could_change():
    changes = (
        "torch.rand(1); random.random(); numpy.random.rand(); numpy.seterr(all='raise'); "
        "torch.set_default_dtype(torch.float32); warnings.simplefilter('ignore'); "
        "Distribution.set_default_validate_args(not Distribution._validate_args); import matplotlib"
    )
    changed, heavy = probe(changes)
    assert heavy == "['matplotlib']"
    for name in ("default dtype", "torch validation", "torch RNG", "numpy RNG", "python RNG"):
        assert name in changed
    assert "numpy errors" in changed
    assert "warning filters" in changed
