# Everything runs in .venv, which the first target makes; nothing needs to be activated.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one: make ... PYTHON=python3.12")'

.DEFAULT_GOAL := help
.PHONY: help demo notebooks test test-gpu check bench bench-peers docs pictures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

PIP := -m pip --disable-pip-version-check install --quiet

DEMO := .venv-demo
DEMO_PIP := $(DEMO)/bin/python $(PIP)

demo: $(DEMO)/.ready ## crop a photo in every dialect and save the picture; has a small environment of its own, without torch
	@$(DEMO)/bin/python examples/crops.py

# The demo runs without Numba, too: a Python that Numba does not support yet is no reason to fail.
$(DEMO)/.ready: setup.cfg pyproject.toml
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(DEMO)
	$(DEMO_PIP) -e '.[examples,cpu]' || $(DEMO_PIP) -e '.[examples]'
	@touch $@

notebooks: $(READY) ## run the notebooks in examples/ and keep their outputs
	@$(BIN)/python -m tests.notebooks

# A process for each core. What waits for a thread of OpenMP sleeps: it would take the core from another process.
test: $(READY) ## run the whole test suite
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

check: $(READY) ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

BENCH := .venv-bench
BENCH_READY := $(or $(wildcard $(BENCH)/.ready),$(READY))
PEERS ?= torchvision onnxruntime tensorflow
ARGS ?=

bench: $(BENCH_READY) ## time the CPU beside every peer that is installed; ARGS="W1 --threads 2", for example
	@$(dir $(BENCH_READY))bin/python -m benchmarks $(ARGS)

# The torchvision of PyPI is for the torch of PyPI. With a TORCH from elsewhere (a build for the CPU, say) it does not
# load: install the torchvision of there into .venv-bench, or do without, by PEERS="onnxruntime tensorflow".
bench-peers: ## install the benchmark's peers, those that can be had, into .venv-bench
	$(PYTHON) -m venv --clear $(BENCH)
	$(BENCH)/bin/python $(PIP) --upgrade pip
	$(BENCH)/bin/python $(PIP) '$(TORCH)'
	PYTHONWARNINGS=ignore $(BENCH)/bin/python $(PIP) -e '.[bench]'
	for peer in $(PEERS); do $(BENCH)/bin/python $(PIP) '$(TORCH)' $$peer || \
	    echo "$$peer cannot be had here: the benchmark will do without it"; done
	@touch $(BENCH)/.ready

docs: $(READY) ## build the guides and the API reference into out/site; a warning or a broken link is an error
	@$(BIN)/python -m sphinx -E -W --keep-going -q docs out/site

pictures: $(READY) ## draw the conventions of coordinates again, for the guides
	@$(BIN)/python docs/draw_conventions.py

STAGES ?= smoke benchmark tests sanitizer
RESULTS ?= out/gpu

test-gpu: ## with a GPU, and CuPy, torch and pytest in $(PYTHON): smoke test, benchmark, all tests, compute-sanitizer
	@$(PYTHON) -m tests.gpu_stages $(STAGES) --out $(RESULTS)

clean: ## remove what the other targets made
	rm -rf $(VENV) $(DEMO) $(BENCH) .nox build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch comes first: a package that wants any torch then leaves this one in place.
$(READY): setup.cfg pyproject.toml
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(PIP) --upgrade pip
	$(BIN)/python $(PIP) '$(TORCH)'
	PYTHONWARNINGS=ignore $(BIN)/python $(PIP) -e '.[test,examples,docs]'
	@touch $(READY)
