# `make demo` and `make test` need only Python >= 3.10 with pip, and make: they create the environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := src schedulers pipelines training tests benchmarks model_cards/render.py docs/site_extensions.py
PACKAGED := $(sort $(wildcard src/diffusers_dpm/* src/diffusers_dpm/*/*.py schedulers/* pipelines/* training/* model_cards/*))

# With threads that spin while they wait, two processes on two cores slow each other down tenfold.
export OMP_WAIT_POLICY ?= PASSIVE
# Two tests at a time, one thread each: the networks of the tests are too small for more.
PYTEST := -m pytest -n 2 --dist worksteal
test unit test-slow compat-oldest compat-newest: export OMP_NUM_THREADS = 1

# The lower bounds of pyproject.toml, together. Tests that do not apply there carry the marker `needs`.
# All are pinned: pip tries each release of what is not (gradio: 30 MB each) until one fits the others. Of what they
# need themselves, later releases of pyarrow, which datasets takes, need NumPy 2.
OLDEST := accelerate==1.10 datasets==4.0 diffusers==0.35 filelock==3.10 gradio==5.40 huggingface-hub==0.34 \
	matplotlib==3.8 numpy==1.24 packaging==22 Pillow==10.1 pyarrow==21.0 pyyaml==6.0 safetensors==0.4.3 \
	scikit-learn==1.3 tensorboard==2.14 torchdiffeq==0.2.3 torchmetrics==1.4 transformers==4.57.1 tyro==1.0.17
NEWEST := diffusers huggingface-hub transformers accelerate datasets

.PHONY: help demo card docs test test-slow compat compat-oldest compat-newest lint types unit format clean FORCE

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-12s %s\n", $$1, $$2}'

demo: $(VENV)/.demo ## train, sample and reload a model of handwritten digits
	$(BIN)/diffusers-dpm demo

card: $(VENV)/.dev ## render model_cards/ddpm-digits.md from its facts, figures and pictures
	$(BIN)/python model_cards/render.py model_cards/ddpm-digits.yaml

docs: $(VENV)/.dev ## build the site in build/site; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint types docs unit ## lint, types, the documentation and the test suite

lint: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(VENV)/.dev
	$(BIN)/mypy -p diffusers_dpm

unit: $(VENV)/.dev
	$(BIN)/python $(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.dev ## the tests that take longer
	$(BIN)/python $(PYTEST) -m "slow and not gpu"

compat: compat-oldest compat-newest ## the tests with the oldest versions (by Python 3.10 or 3.11) and with the newest

compat-oldest: REQUIREMENTS = $(OLDEST)
compat-newest: REQUIREMENTS = --upgrade $(NEWEST)
compat-oldest compat-newest: compat-%:
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]" $(REQUIREMENTS)
	build/$*/bin/python $(PYTEST) -m "not slow and not gpu"

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
