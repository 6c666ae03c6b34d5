# dtrain's chores. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# A lane is a set of versions that go together, constraints/$(LANE).txt; each has an environment of its own.
LANE ?= keras3
VENV ?= .venv
MPICH_VENV ?= .venv-mpich
# `tensorflow` for the full build (600 MB)
TENSORFLOW ?= tensorflow-cpu
HOROVOD_VERSION := 0.28.1

ifeq ($(LANE),keras3)
  LANE_VENV := $(VENV)
  PYTHONS := 3.10, 3.11 or 3.12
  REQUIRE := mpi,mpich,chainer,tensorflow,horovod,s3,jupyter
  # tf_keras asks for the full tensorflow by name, also beside tensorflow-cpu, so it is installed without what it asks for.
  NO_DEPS := tf_keras
else ifeq ($(LANE),keras2)
  LANE_VENV := $(VENV)-keras2
  PYTHONS := 3.10 or 3.11
  WHY := : TensorFlow 2.15 has no build for 3.12
  REQUIRE := mpi,chainer,tensorflow,horovod
  NO_DEPS :=
else
  $(error there is no lane '$(LANE)'; LANE is keras3, the default, or keras2)
endif

# What is not to be skipped either, as CI asks for where it can: DTRAIN_REQUIRE=netcluster
DTRAIN_REQUIRE ?=
COMMA := ,
# How many processes run tests, for two cores: one of them begins with tests/cluster, which waits more than it computes. ARGS='-n 0' is
# for one, with a debugger say.
PROCESSES ?= 2

BIN := $(LANE_VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
# Chainer's and Horovod's sources need the old build tools of constraints/build.txt, which lie in the environment itself.
LOCKED := --no-build-isolation -c constraints/build.txt -c constraints/$(LANE).txt
PART := .ci/part

# A stamp says what is installed; its name holds the Python, so that another PYTHON= means another environment.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
STAMPS := $(LANE_VENV)/.dtrain
VENV_STAMP := $(STAMPS)/python-$(PYTHON_VERSION)
DEMO_STAMP := $(STAMPS)/demo
TEST_STAMP := $(STAMPS)/test-$(TENSORFLOW)
MPICH_STAMP := $(MPICH_VENV)/.dtrain-$(PYTHON_VERSION)
INPUTS := Makefile setup.py pyproject.toml constraints/build.txt constraints/$(LANE).txt
TEST_STAMPS := $(TEST_STAMP) $(if $(findstring mpich,$(REQUIRE)),$(MPICH_STAMP))

PYTEST := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest
ifneq ($(findstring mpich,$(REQUIRE)),)
  PYTEST := DTRAIN_TEST_MPICH_PYTHON="$(abspath $(MPICH_VENV))/bin/python" $(PYTEST)
endif

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1 \t/' | expand -t 20

.PHONY: demo
demo: $(DEMO_STAMP) ## train on two ranks, show the run, register the model
	$(BIN)/dtrain run -n 2 --experiment digits examples/chainer_digits.py --epochs 10
	$(BIN)/dtrain register latest --name digits
	$(BIN)/dtrain show latest
	$(BIN)/dtrain models
	@echo
	@echo "dtrain itself        $(BIN)/dtrain --help"
	@echo "runs, newest last"
	@ls -1d workspace/runs/*/ | sed 's/^/                     /' | tail -n 3
	@echo "  code/              the snapshot of the sources that ran"
	@echo "  outputs/           the model, metrics/ and checkpoints/"
	@echo "  ranks/             every rank's own output"
	@echo "registered models    workspace/registry/"

.PHONY: test
test: ## install everything (Horovod is built once and kept), then linters and all tests
	@$(PART) 'install' $(MAKE) --no-print-directory test-environment
	@$(PART) 'lint' $(MAKE) --no-print-directory lint
	@$(PART) 'tests' $(MAKE) --no-print-directory pytest

.PHONY: test-keras2
test-keras2: ## the same with TensorFlow 2.15, Keras 2 and NumPy 1: the tests that depend on them
	@$(MAKE) --no-print-directory LANE=keras2 check-python
	@$(PART) 'install keras2' $(MAKE) --no-print-directory LANE=keras2 test-environment
	@$(PART) 'tests keras2' $(MAKE) --no-print-directory LANE=keras2 pytest

.PHONY: test-environment
test-environment: $(TEST_STAMPS)

.PHONY: pytest
pytest: $(TEST_STAMPS) # ARGS are handed on, LANE says which versions: make pytest LANE=keras2 ARGS='-k registry'
	$(PYTEST) -n $(PROCESSES) --lane=$(LANE) --require=$(REQUIRE)$(addprefix $(COMMA),$(DTRAIN_REQUIRE)) $(ARGS)

.PHONY: lint
lint: $(TEST_STAMP) ## ruff, its formatter and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict dtrain

.PHONY: format
format: $(TEST_STAMP) ## let ruff mend and format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench-tensorflow
bench-tensorflow: $(TEST_STAMP) ## steps a second of TensorFlow through dtrain against the same without it, in half an hour
	$(BIN)/python benchmarks/bench_tensorflow.py $(ARGS)

.PHONY: bench-launch
bench-launch: $(TEST_STAMP) ## what dtrain adds to the start and end of bare mpirun, and what showing the output costs, in three minutes
	$(BIN)/python benchmarks/bench_launch.py $(ARGS)

# The CUDA release of the installed driver: CuPy has one package for each.
CUDA = $(shell nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA Version: ([0-9]+)\..*/\1/p')
.PHONY: gpu-check
gpu-check: ## the tests that need an NVIDIA GPU; fails where there is none
	@if ! nvidia-smi -L 2>/dev/null; then \
	    echo "no GPU here: nvidia-smi finds none. gpu-check needs an NVIDIA GPU with its driver; nothing was tested" >&2; exit 1; fi
	@$(MAKE) --no-print-directory $(VENV_STAMP)
	$(PIP) $(LOCKED) -e '.[demo,dev,cuda$(CUDA)]'
	$(PYTEST) -m gpu --require=gpu,mpi,chainer $(ARGS)

.PHONY: clean
clean: ## remove environments, caches and build results; runs in workspace/ stay
	rm -rf $(VENV) $(VENV)-keras2 $(MPICH_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What installs what

.PHONY: check-python
check-python:
	@$(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(PYTHONS)".replace(",", "").split())' 2>/dev/null || { \
	    echo "dtrain$(if $(WHY), with constraints/$(LANE).txt) needs Python $(PYTHONS)$(WHY); '$(PYTHON)' is $(or $(PYTHON_VERSION),not there). Say which: make $(if $(WHY),test-$(LANE),demo) PYTHON=python3.11" >&2; exit 2; }

$(VENV_STAMP): constraints/build.txt | check-python
	@# Another Python than last time: the old environment would shadow the one that was asked for.
	@if [ -e $(LANE_VENV) ] && [ ! -d $(STAMPS) ]; then echo "$(LANE_VENV) is there, and not made by this Makefile; name another folder: make ... VENV=DIR" >&2; exit 2; fi
	@[ -e $@ ] || rm -rf $(LANE_VENV)
	$(PYTHON) -m venv $(LANE_VENV)
	$(PIP) -r constraints/build.txt
	@mkdir -p $(STAMPS) && touch $@

$(DEMO_STAMP): $(VENV_STAMP) $(INPUTS)
	$(PIP) $(LOCKED) -e '.[demo]'
	@touch $@

$(TEST_STAMP): $(VENV_STAMP) $(INPUTS) .ci/horovod_wheel.sh
	$(PIP) $(LOCKED) -e '.[demo,dev,s3]' $(TENSORFLOW) cloudpickle packaging pyyaml
	$(if $(NO_DEPS),$(PIP) --no-deps $(LOCKED) $(NO_DEPS))
	wheel=$$(.ci/horovod_wheel.sh $(BIN)/python $(HOROVOD_VERSION)); $(PIP) --no-deps --force-reinstall "$$wheel"
	@touch $@ $(DEMO_STAMP)

$(MPICH_STAMP): $(INPUTS) | check-python
	rm -rf $(MPICH_VENV)
	$(PYTHON) -m venv $(MPICH_VENV)
	$(MPICH_VENV)/bin/python -m pip install --quiet -r constraints/build.txt
	$(MPICH_VENV)/bin/python -m pip install --quiet $(LOCKED) mpich mpi4py pytest pytest-mpi pytest-timeout -e .
	@touch $@
