# Everything here runs from a fresh clone on a machine that has Python (3.11 or newer), make and a C library.
# `make demo` and `make test` create .venv on their first run, and install again only when pyproject.toml has changed.
#
#   make demo PYTHON=python3.12       another Python for .venv (after `make clean` where .venv exists already)

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUNTIME := .venv/.goldsmith-runtime
DEVELOPMENT := .venv/.goldsmith-development
DOCUMENTATION := .venv/.goldsmith-documentation

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench bench-lm-eval faults invariance clean

help:
	@echo "make demo        train on real gold in two minutes, and look at the result"
	@echo "make test        ruff, mypy, import-linter, pytest with doctests"
	@echo "make format      let ruff mend what it can"
	@echo "make docs        the documentation as a site, into site/"
	@echo "make bench       speed and memory beside a plain loop"
	@echo "make bench-lm-eval  log P and speed beside lm-evaluation-harness"
	@echo "make faults      the long campaign of kills and cuts"
	@echo "make invariance  every cut of a step against a plain loop: the whole product (SHARD=i/n: a part of it)"
	@echo "make clean       remove .venv and every cache; runs/ stays"

demo: $(RUNTIME)
	$(BIN)/goldsmith demo

test: lint
	$(BIN)/python -m pytest

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEVELOPMENT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCUMENTATION)
	$(BIN)/mkdocs build --strict

bench: $(DEVELOPMENT)
	$(BIN)/python benchmarks/run.py

bench-lm-eval: $(DEVELOPMENT)
	test -x benchmarks/.venv-lm-eval/bin/pip || $(BIN)/python benchmarks/lm_eval.py --install
	$(BIN)/python benchmarks/lm_eval.py

faults: $(DEVELOPMENT)
	$(BIN)/python -m pytest tests -m campaign

# Two or three hours on one core; SHARD=2/8 is the second of eight parts. What failed runs again with ARGS=--last-failed.
SHARD ?= 1/1
invariance: $(DEVELOPMENT)
	GOLDSMITH_SHARD=$(SHARD) $(BIN)/python -m pytest tests/invariance tests/golden -s -m '' $(ARGS)

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# What runs `goldsmith`, and in addition what tests it. The stamps are written last: an install that was cut off is done again.
$(RUNTIME): pyproject.toml | $(BIN)/pip
	@echo "Installing goldsmith into .venv (some minutes on the first run)"
	@$(PIP) install --quiet --editable '.[demo]'
	@touch $@

$(DEVELOPMENT): pyproject.toml | $(BIN)/pip
	@echo "Installing goldsmith and its development tools into .venv (some minutes on the first run)"
	@$(PIP) install --quiet --editable '.[demo,dev]'
	@touch $@ $(RUNTIME)

$(DOCUMENTATION): pyproject.toml | $(BIN)/pip
	@echo "Installing goldsmith and what builds its documentation into .venv (some minutes on the first run)"
	@$(PIP) install --quiet --editable '.[demo,docs]'
	@touch $@ $(RUNTIME)

# pip is the last file that `python -m venv` writes. What is missing is said in one line.
$(BIN)/pip:
	@$(PYTHON) -c 'pass' >/dev/null 2>&1 \
	  || { echo "Python 3.11 or newer is missing: '$(PYTHON)' does not run; try: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "Python 3.11 or newer is missing: '$(PYTHON)' is $$($(PYTHON) -c 'import platform; print(platform.python_version())'); try: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "Python's venv module is missing (on Debian and Ubuntu: apt install python3-venv); or try: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
