# make: what CI runs is `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
JOBS ?= 2

.PHONY: setup demo test browser lint types bench notebooks dist clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %s is too old, 3.11 or newer is needed: make PYTHON=python3.11 setup" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[data,notebooks,dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/bmaml-ppl demo

test: setup browser lint types
	$(BIN)/python -m pytest -n $(JOBS)

# The report is opened in a real browser; without one, and without the right to install it, that test is skipped.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	} || echo "no browser could be installed: the test that opens the report in one is skipped"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	set -e; for script in benchmarks/bench_*.py; do $(BIN)/python "$$script"; done

notebooks: setup
	$(BIN)/python -m pytest tests/test_notebooks.py

dist: setup
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
