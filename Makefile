# `make` lists the targets. `make train` and `make test` are all that a fresh machine needs.

VENV := .venv
# The first Python that is new enough and can make environments.
FITS := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
  $$name -c "$(FITS)" >/dev/null 2>&1 && { echo $$name; break; }; done)
# A wheel index to take torch from instead of the default one, such as PyTorch's own for the CPU.
TORCH_INDEX ?=
TRAIN_FLAGS ?= --epochs 3 --batch-size 16 --output gpt.pth
# Parts and flags of benchmarks/gpu.py, such as GPU_FLAGS="attention ffn".
GPU_FLAGS ?=
export NANOGPT_DATA ?= $(wildcard ../shared/data)

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
BUILT := $(VENV)/.built

.DEFAULT_GOAL := help
.PHONY: help build train test test-all lint format bench gpu wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(BUILT)  ## make .venv and install the package with its pins

$(BUILT): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed:" \
	  "apt-get install python3 python3-venv, or make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@test -z "$(TORCH_INDEX)" || $(PIP) install --quiet -c constraints.txt torch --index-url "$(TORCH_INDEX)"
	$(PIP) install --quiet -c constraints.txt --editable ".[test]"
	@touch $@

train: build  ## train on the built-in text, write gpt.pth and a report, print a sample
	$(RUN) -m nanogpt.train $(TRAIN_FLAGS)

test: build  ## run the tests
	$(RUN) -m pytest -m "not slow"

test-all: build  ## run the tests and the slow ones
	$(RUN) -m pytest

lint: build  ## check style and types
	$(PIP) install --quiet -c constraints.txt ruff mypy types-PyYAML
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: build  ## rewrite the code in the project's style
	$(PIP) install --quiet -c constraints.txt ruff
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: build  ## measure this machine: the fused operations, a training step, writing
	$(RUN) -m pytest benchmarks --benchmark-only

gpu: build  ## measure the CUDA device in eight minutes and renew RESULTS.md
	$(RUN) benchmarks/gpu.py $(GPU_FLAGS)
	$(RUN) benchmarks/make_results.py

wheel: build  ## build the wheel into dist/
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find nanogpt tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
