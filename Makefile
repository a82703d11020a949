# make quickstart   install into .venv and run the main example
# make test         install into .venv and run the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
JUNIT := build/junit.xml
ARGS ?=

# The first of these that really is a Python 3.12: a shim on PATH may exist and still refuse to run.
PYTHON312 ?= $(shell for p in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: help install quickstart test test-slow lint format docs bench test-arviz1 clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install into $(VENV) and run the main example (ARGS='--seeds 5' passes options on)"
	@echo "make test         install into $(VENV) and run the test suite"
	@echo "make test-slow    long statistical checks and planted bugs"
	@echo "make lint         ruff check, ruff format, mypy          make format   rewrite with ruff"
	@echo "make docs         HTML documentation, warnings are errors"
	@echo "make bench        every script of tests/benchmarks"
	@echo "make test-arviz1  the ArviZ 1.x converter, in a Python 3.12 environment of its own"
	@echo "make clean        remove environments and everything built"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): one to three minutes the first time."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@

# JAX in an environment of its own: it and torch pin each other's requirements.
.venv-bench-jax/.installed:
	$(PYTHON) -m venv .venv-bench-jax
	.venv-bench-jax/bin/python -m pip install --disable-pip-version-check \
		blackjax==1.7.1 numpyro==0.22.0 jax==0.10.2 inference_gym==0.0.5
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py $(ARGS)

test test-slow bench: export OMP_NUM_THREADS = 1

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -q --junitxml=$(JUNIT) $(ARGS)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -q -m slow $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "Documentation: docs/_build/html/index.html"

bench: $(VENV)/.installed-bench .venv-bench-jax/.installed
	@set -e; found=; for script in tests/benchmarks/*.py; do \
		[ -e "$$script" ] || continue; found=1; echo "== $$script"; $(BIN)/python "$$script" $(ARGS); \
	done; [ -n "$$found" ] || { echo "tests/benchmarks holds no script"; exit 1; }

# The converter works on NumPy arrays, so this environment needs neither torch nor Pyro.
.venv-arviz1/.installed:
	@[ -n "$(PYTHON312)" ] || { echo "No Python 3.12 found; say where: make test-arviz1 PYTHON312=/path/to/python3.12"; exit 1; }
	"$(PYTHON312)" -m venv .venv-arviz1
	.venv-arviz1/bin/python -m pip install --disable-pip-version-check numpy 'arviz>=1,<2' h5netcdf h5py pytest
	@touch $@

test-arviz1: .venv-arviz1/.installed
	PYTHONPATH=. .venv-arviz1/bin/python -m pytest -q --confcutdir=tests/arviz1 tests/arviz1

clean:
	rm -rf $(VENV) .venv-arviz1 .venv-bench-jax build dist docs/_build results
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
