# The two commands for a newcomer: `make demo` and `make test`. Both create .venv and install first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs bench clean

demo: .venv/.demo-ready
	$(BIN)/lit-merge demo --output runs/demo --replace

test: check
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: .venv/.dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The claims on real data, three seeds: more than an hour; other benchmarks are run one by one.
bench: .venv/.dev-ready
	$(BIN)/python benchmarks/experiments.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lit-merge needs Python 3.10 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv .venv

.venv/.demo-ready: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.dev-ready: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/.demo-ready

clean:
	rm -rf .venv build dist runs *.egg-info
