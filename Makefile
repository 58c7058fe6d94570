# `make demo` and `make test` need only Python >= 3.10 with pip, and make: they create the environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := src schedulers pipelines training tests benchmarks
PACKAGED := $(sort $(wildcard src/diffusers_dpm/* schedulers/* pipelines/* training/* model_cards/*))

# With threads that spin while they wait, two processes on two cores slow each other down tenfold.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-slow lint types unit format clean FORCE

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-12s %s\n", $$1, $$2}'

demo: $(VENV)/.demo ## train, sample and reload a model of handwritten digits
	$(BIN)/diffusers-dpm demo

test: lint types unit ## lint, types and the test suite

lint: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(VENV)/.dev
	$(BIN)/mypy -p diffusers_dpm

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/.dev ## the tests that take longer
	$(BIN)/python -m pytest -m "slow and not gpu"

format: $(VENV)/.dev ## rewrite the sources in the project's format
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The editable install links single files, so it is made again when one comes or goes.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt $(VENV)/.files
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

$(VENV)/.files: $(BIN)/python FORCE
	@echo "$(PACKAGED)" | cmp -s - $@ || echo "$(PACKAGED)" > $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
