# `make train` and `make test` do everything on a machine with python3 (3.11 or later), git and make.
PYTHON ?= python3
WORKDIR ?= runs/stdlib_bytes
JOBS ?= 2
BIN := .venv/bin

.PHONY: train test test-slow lint docs catalogue clean

train: .venv/run
	$(BIN)/python -m attnx.train --config configs/stdlib_bytes.py --workdir $(WORKDIR)

test: .venv/test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-slow: .venv/test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

lint: .venv/test
	$(BIN)/python -m flake8 attnx pallas_kernels configs experiments tests
	$(BIN)/python -m mypy

docs: .venv/run
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs attnx

catalogue: .venv/run
	$(BIN)/python -m attnx.analysis.catalogue

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnx needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/run: setup.cfg | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test: setup.cfg | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/run

clean:
	rm -rf .venv build *.egg-info
