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
# The text of make speedrun; without it tinyshakespeare in NANOGPT_DATA, or the built-in corpus.
SPEEDRUN_TEXT ?=
# Flags of the suites, such as BENCH_FLAGS="--peer-dir ../nanoGPT"; benchmarks/conftest.py says which.
BENCH_FLAGS ?=
# Flags of tests/faults, such as FAULTS_FLAGS="--kills 100 --damaged 1000".
FAULTS_FLAGS ?=
# How long make fuzz takes for each parser.
SECONDS ?= 60
# 0 lets a build go on without its native parts where they do not compile.
export NANOGPT_REQUIRE_NATIVE ?= 1
export NANOGPT_DATA ?= $(wildcard ../shared/data)

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
BUILT := $(VENV)/.built
COMPILER := $(shell command -v $(firstword $(CXX)) || command -v g++ || command -v clang++)
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')
BUILD_TOOLS := setuptools cmake ninja nlohmann-json pybind11
PLUGIN := nanogpt_torchscript.so

.DEFAULT_GOAL := help
.PHONY: help build plugin train test test-all faults fuzz lint format bench speedrun gpu wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(BUILT)  ## make .venv; install the package with its pins; compile what is native

$(BUILT): pyproject.toml setup.py constraints.txt $(CPP) $(shell find csrc -name CMakeLists.txt)
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed:" \
	  "apt-get install python3 python3-venv, or make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@test -z "$(TORCH_INDEX)" || $(PIP) install --quiet -c constraints.txt torch --index-url "$(TORCH_INDEX)"
	$(PIP) install --quiet -c constraints.txt $(BUILD_TOOLS)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable ".[test]"
	@if [ -n "$(COMPILER)" ]; then $(MAKE) --no-print-directory plugin; \
	  else echo "no C++ compiler: built without the native engine (apt-get install g++ adds it)"; fi
	@touch $@

# The generation binary looks for the plug-in in its environment.
plugin:
	@mkdir -p build/torchscript $(VENV)/lib/nanogpt
	@rm -f build/torchscript/CMakeCache.txt  # it may know another torch, or this folder elsewhere
	@{ $(VENV)/bin/cmake -S csrc/torchscript -B build/torchscript -G Ninja \
	  -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(VENV)/bin/ninja" -DPython3_EXECUTABLE="$(CURDIR)/$(RUN)" \
	  && $(VENV)/bin/cmake --build build/torchscript; } >build/torchscript/log.txt 2>&1 \
	  && cp build/torchscript/$(PLUGIN) nanogpt/$(PLUGIN) \
	  && ln -sf "$(CURDIR)/nanogpt/$(PLUGIN)" $(VENV)/lib/nanogpt/$(PLUGIN) \
	  || { cat build/torchscript/log.txt; echo "the TorchScript plug-in was not built"; \
	       exit $(NANOGPT_REQUIRE_NATIVE); }

train: build  ## train on the built-in text, write gpt.pth and a report, print a sample
	$(RUN) -m nanogpt.train $(TRAIN_FLAGS)

test: build  ## run the tests
	$(RUN) -m pytest -m "not slow"

test-all: build  ## run the tests and the slow ones
	$(RUN) -m pytest

lint: build  ## check style, types, and that no pinned package is known to be vulnerable
	$(PIP) install --quiet -c constraints.txt ruff mypy types-PyYAML clang-format pip-audit
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) tests/audit_pins.py

format: build  ## rewrite the code in the project's style
	$(PIP) install --quiet -c constraints.txt ruff clang-format
	$(VENV)/bin/clang-format -i $(CPP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

faults: build  ## damage files, cut saves off, cut the power, kill and stop runs: half an hour
	$(RUN) tests/faults $(FAULTS_FLAGS)

fuzz: build  ## mutate what every parser and reader reads, SECONDS (60) for each
	$(RUN) tests/fuzz --seconds $(SECONDS)

bench: build  ## run every suite of benchmarks on this machine; BENCH_FLAGS adds peers
	$(RUN) -m pytest benchmarks --benchmark-only $(BENCH_FLAGS)

speedrun: build  ## text, train, align, calibrate, export, write: minutes; renews RESULTS.md
	$(RUN) benchmarks/speedrun.py $(if $(SPEEDRUN_TEXT),--text "$(SPEEDRUN_TEXT)")
	$(RUN) benchmarks/make_results.py

gpu: build  ## measure the CUDA device in eight minutes and renew RESULTS.md
	$(RUN) benchmarks/gpu.py $(GPU_FLAGS)
	$(RUN) benchmarks/make_results.py

wheel: build  ## build the wheel into dist/
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info nanogpt/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find nanogpt tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
