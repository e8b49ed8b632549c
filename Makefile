# Everything runs in .venv, which the first target makes; nothing needs to be activated.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo notebooks test test-gpu check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## crop a real photo in every dialect, write the picture, say what was done
	@$(BIN)/python examples/crops.py

notebooks: $(READY) ## run the notebooks in examples/ and keep their outputs
	@$(BIN)/python -m tests.notebooks

test: $(READY) ## run the whole test suite
	@$(BIN)/python -m pytest -q

check: $(READY) ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY) ## time the workloads on the CPU, beside torchvision where it is installed
	@$(BIN)/python -m benchmarks

SANITIZER ?= compute-sanitizer
RESULTS ?= benchmarks/results

test-gpu: ## with a GPU, and CuPy, torch and pytest in $(PYTHON): tests, compute-sanitizer, benchmark
	CUPY_ROIALIGN_REQUIRE_GPU=1 $(PYTHON) -m pytest -q -m gpu
	for tool in memcheck racecheck initcheck synccheck; do \
	    $(SANITIZER) --tool $$tool --error-exitcode 1 $(PYTHON) -m tests.sanitize || exit 1; done
	$(PYTHON) -m benchmarks.gpu --out $(RESULTS)

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch comes first: a package that wants any torch then leaves this one in place.
$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; say which: make test PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[test,examples]'
	@touch $(READY)
