# make: what CI runs is `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
JOBS ?= 2
PEERS := .venv/.peers
TIMED ?= meta_gradient maml adapt memory scaling gpu laplace

.PHONY: setup demo test browser lint types bench bench-accuracy notebooks dist clean

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

# Everything beside peers, about 20 minutes on two cores; leave the machine alone meanwhile.
bench: $(PEERS)
	set -e; for job in $(TIMED); do echo "== $$job"; $(BIN)/python -m benchmarks.bench_$$job; done
	$(BIN)/python -m benchmarks.table

# How right the posteriors are; slower, since Pyro's NUTS is timed on 20 tasks.
bench-accuracy: setup
	set -e; for job in sbc spread; do echo "== $$job"; $(BIN)/python -m benchmarks.bench_$$job; done

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	touch $(PEERS)

notebooks: setup
	$(BIN)/python -m pytest tests/test_notebooks.py

dist: setup
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
