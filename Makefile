PYTHON ?= python3
BIN := .venv/bin
FOLDERS := common kernels kernels/cpu kernels/pixels data data/encodings data/sources data/store data/store/locations data/views models models/networks models/hubs models/export pages precompute precompute/caches precompute/cli precompute/page precompute/executors distill distill/losses distill/methods distill/fusion distill/exchange distill/targets distill/setup distill/training distill/runs distill/runs/chain distill/runs/tracking distill/report distill/cli

# Processes that run tests side by side; each computes on one thread.
WORKERS ?= 2

# Tests start many processes: each but the first imports modules that are compiled.
unexport PYTHONDONTWRITEBYTECODE

# Extras of setup.cfg that the tests marked browser, cluster or integration need beyond `dev`, comma-separated.
TEST_EXTRAS := browser,cluster,docs,s3,s3-server,wandb,mlflow-client

# The demo runs the benchmark of an epoch.
BENCHMARKS := store fidelity views sources precompute loss train allocator methods classes sequences peers memory \
  simulation remote

.PHONY: help demo test pytest check marked test-all test-slow lint docs pictures bench clean

help:
	@echo "make demo       train teachers, precompute them, distil students, print two tables (about 2 minutes)"
	@echo "make test       lint, types and tests, on two cores (WORKERS=8: on eight)"
	@echo "make test-all   the same, and the tests that drive browsers, clusters and other programs"
	@echo "make lint       ruff and mypy only"
	@echo "make docs       the docs as a site in site/; warnings are errors"
	@echo "make pictures   the pictures of the report in docs, from the demo's runs"
	@echo "make bench      every benchmark at full size, and the tables of README and docs"

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

pytest: .venv/installed
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile

check: lint pytest

# Side by side, since linters and types use one core.
test: .venv/installed
	@$(BIN)/python tests/timed.py $(MAKE) --no-print-directory -j2 check

# Installed after the default tests, which pass with `dev` alone. Most files of the extras are never imported.
.venv/installed-all: .venv/installed
	$(if $(TEST_EXTRAS),$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-build-isolation -e ".[$(TEST_EXTRAS)]" -C editable_mode=strict)
	@touch $@

marked: .venv/installed-all
	$(BIN)/pytest -q -m "browser or cluster or integration"

test-all: test
	@$(BIN)/python tests/timed.py $(MAKE) --no-print-directory marked

test-slow: .venv/installed
	$(BIN)/pytest -m slow

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]" -C editable_mode=strict
	@touch $@

docs: .venv/installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs site
	@echo "open site/index.html"

# The demo's runs are trained if there are none.
pictures: .venv/installed-all
	test -d demo/runs || $(BIN)/python examples/demo.py
	$(BIN)/python docs/pictures.py

# A bar that does not hold is reported, and the others are measured all the same. `remote` needs an extra.
bench: .venv/installed-all
	status=0; results=benchmarks/results; \
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --json $$results/$$name.json || status=1; done; \
	$(BIN)/python benchmarks/methods.py --section cost --json $$results/methods-cost.json || status=1; \
	for section in students training; do \
		$(BIN)/python benchmarks/views.py --section $$section --json $$results/views-$$section.json || status=1; \
	done; \
	$(BIN)/python examples/demo.py --json $$results/demo.json || status=1; \
	$(BIN)/python benchmarks/render.py; exit $$status

clean:
	rm -rf .venv build demo site *.egg-info
