# make demo      train a small language model, make it parallel, measure it (six minutes on two free cores)
# make starter   train and measure the pair that comes with the package, and put it in its place
# make test      all tests but the slow ones       make test-all   all tests
# make check     ruff and mypy                     make setup      the environment alone
# make docs      the documentation as a site, in build/site
# make audit     known faults of the pinned versions; needs a network that reaches pypi.org

PYTHON ?= python3
BIN := .venv/bin
# Each test is small: they share the cores by processes, not each by threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile

.PHONY: setup demo starter test test-all check docs audit

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group dev --editable .
	touch $@

demo: setup
	$(BIN)/ptp demo $(ARGS)

starter: setup
	$(BIN)/python scripts/make_starter.py $(ARGS)

test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-all: setup
	$(PYTEST) $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# --strict: what could not be looked up has not been audited.
audit: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt
