PYTHON ?= python3
BIN := .venv/bin
FOLDERS := common kernels data data/encodings data/sources data/store data/store/locations data/views models models/networks models/hubs precompute precompute/cli precompute/executors distill distill/losses distill/fusion distill/targets distill/setup distill/training distill/runs distill/cli

# The demo runs the benchmark of an epoch.
BENCHMARKS := store views loss train methods memory

.PHONY: help demo test test-slow lint bench clean

help:
	@echo "make demo   train teachers, precompute them, distil students, print two tables (about 2 minutes)"
	@echo "make test   lint, types and tests"
	@echo "make lint   ruff and mypy only"
	@echo "make bench  every benchmark at full size, and the tables of README and docs"

# Folders are prerequisites because the strict install links file by file: a new file needs a new install.
.venv/installed: setup.cfg pyproject.toml $(FOLDERS)
	@$(PYTHON) -c 'import sys; sys.exit("coursepack needs Python 3.11 or later, this is " + sys.version.split()[0] + ": make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -C editable_mode=strict
	@touch $@

demo: .venv/installed
	$(BIN)/python examples/demo.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

test-slow: .venv/installed
	$(BIN)/pytest -m slow

# A bar that does not hold is reported, and the others are measured all the same.
bench: .venv/installed
	status=0; results=benchmarks/results; \
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --json $$results/$$name.json || status=1; done; \
	$(BIN)/python examples/demo.py --json $$results/demo.json || status=1; \
	$(BIN)/python benchmarks/render.py; exit $$status

clean:
	rm -rf .venv build demo *.egg-info
