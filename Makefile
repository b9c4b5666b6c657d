# `make train` and `make test` do everything on a machine with python3 (3.11 or later), git and make.
PYTHON ?= python3
PYTHON3_12 ?= python3.12
WORKDIR ?= runs/stdlib_bytes
JOBS ?= 2
BIN := .venv/bin

.PHONY: train test test-slow test-tpu test-cuda test-gpu lint docs catalogue clean

train: .venv/run
	$(BIN)/python -m attnx.train --config configs/stdlib_bytes.py --workdir $(WORKDIR)

test: .venv/test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-slow: .venv/test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

# Compiles for TPUs ahead of time, with libtpu in an environment of its own; wants no TPU.
test-tpu: .venv-tpu/test
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest -n $(JOBS) -m "libtpu and not slow"

# Compiles for an H100 ahead of time; wants Python 3.12 or later and no GPU.
test-cuda: .venv-gpu/test
	JAX_PLATFORMS=cpu .venv-gpu/bin/python -m pytest -n $(JOBS) -m "cuda and not slow"

# The contract of every implementation on the GPU at hand.
test-gpu: .venv-gpu/test
	OPTIMISE=3 .venv-gpu/bin/python -m pytest -m gpu tests/test_gpu.py

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

.venv-tpu/test: setup.cfg
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --editable '.[test,tpu]'
	touch $@

.venv-gpu/test: setup.cfg
	$(PYTHON3_12) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable '.[test,cuda]'
	touch $@

clean:
	rm -rf .venv .venv-tpu .venv-gpu build *.egg-info
