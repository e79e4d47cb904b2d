# Needs Python 3.10 or newer and make; everything else is installed into .venv on first use.
#   make test WORKERS=8 OMP_NUM_THREADS=2     more processes, more threads
#   make test TESTS=tests/test_masks.py       some of the tests
#   make demo ARGS="--help"                   options for the command

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TESTS ?= tests
MARKERS ?= not slow and not zoo and not gaudi
ARGS ?=
OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
PY := $(BIN)/python
INSTALLED := $(VENV)/.installed
GAUDI_VENV := .venv-gaudi
GAUDI_INSTALLED := $(GAUDI_VENV)/.installed
OLDEST_VENV := .venv-oldest
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed
OLDEST_PACKAGES := -e '.[hf,bench]' hypothesis pytest pytest-timeout pytest-xdist
OLDEST_TESTS ?= $(wildcard tests/test_engine_*.py) tests/test_memory.py tests/test_masks.py tests/test_allocation.py \
	tests/test_discovery.py tests/test_compile_blocks.py tests/test_peft.py tests/test_callback.py
PYTEST := OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(PY) -m pytest
PIP_OPTIONS := --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint zoo bench bench-gpu test-gaudi test-oldest docs clean

help:  ## list all targets
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# $(1) the environment, $(2) its constraints, $(3) what to install
define install
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed; $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@echo "Setting up $(1): some minutes, once"
	test -x $(1)/bin/pip || $(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install $(PIP_OPTIONS) --quiet --upgrade -c $(2) setuptools wheel
	$(1)/bin/python -m pip install $(PIP_OPTIONS) --no-build-isolation -c $(2) $(3)
endef

setup: $(INSTALLED)  ## install everything for development into .venv

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,-e '.[dev]')
	$(BIN)/python -m pip install $(PIP_OPTIONS) --quiet --no-build-isolation -c constraints.txt -e '.[stacks]'
	@touch $@

demo: $(INSTALLED)  ## fine-tune a small chat model with and without DropBP, and compare the two
	$(BIN)/dropbp finetune $(ARGS)

test: $(INSTALLED)  ## run the tests, except the slow ones
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "$(MARKERS)" $(ARGS) $(TESTS)

lint: $(INSTALLED)  ## check style, types, contents of the wheel, import direction
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -q tests/test_packaging.py tests/test_import_arrows.py

zoo: $(INSTALLED)  ## check every model class of transformers that a tiny config can build
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(PY) -m tests.campaigns.zoo $(ARGS)

bench: $(INSTALLED)  ## measure speed, memory and learning against rival methods, on this machine's CPU
	$(BIN)/dropbp bench all $(ARGS)

bench-gpu: $(INSTALLED)  ## measure the same at the paper's settings, on a CUDA machine
	$(BIN)/dropbp bench all --device cuda $(ARGS)

$(GAUDI_INSTALLED): pyproject.toml constraints-gaudi.txt tests/gaudi/setup_env.py
	$(call install,$(GAUDI_VENV),constraints-gaudi.txt,-e '.[gaudi]' peft ninja pytest pytest-timeout pytest-xdist)
	$(GAUDI_VENV)/bin/python tests/gaudi/setup_env.py
	@touch $@

test-gaudi: $(GAUDI_INSTALLED)  ## test the unmodified GaudiTrainer on the simulated HPU (in .venv-gaudi)
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(GAUDI_VENV)/bin/python -m pytest -n $(WORKERS) -m gaudi $(ARGS) tests/gaudi

$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST_VENV),constraints-oldest.txt,$(OLDEST_PACKAGES))
	@touch $@

test-oldest: $(OLDEST_INSTALLED)  ## test the core with the oldest supported versions (in .venv-oldest)
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(OLDEST_VENV)/bin/python -m pytest -n $(WORKERS) -m "$(MARKERS)" $(ARGS) $(OLDEST_TESTS)

docs: $(INSTALLED)  ## build the documentation site, with the API reference from the docstrings
	$(PY) -m pip install $(PIP_OPTIONS) --quiet --no-build-isolation -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:  ## remove build files; keep environments and runs
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
