# Two commands: `make quickstart` and `make test`. Both make the environment in .venv first.
# PYTHON= takes another Python, VENV= another folder for its environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow test-examples test-torch test-gpu lint notebook needles clean

quickstart: $(VENV)/core
	$(BIN)/python -m experiments.quickstart $(FLAGS)

test: $(VENV)/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" tests

# SLOW="slow and not matrix" leaves out the cells of matrices that others stand for.
SLOW ?= slow
test-slow: $(VENV)/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m "$(SLOW)" tests

# What hypothesis draws, with more examples than in `make test`.
EXAMPLES ?= 60
test-examples: $(VENV)/dev
	JAX_PLATFORMS=cpu EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -n 2 -m "hypothesis and not gpu" tests

# What needs torch: the RAT+ authors' files, and OLMo 2 in transformers. Python 3.11, for which there is a small build.
test-torch: $(VENV)/dev
	$(BIN)/python -m pip install --quiet torch==2.13.0 transformers==5.24.0
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/rat_jax/convert/test_convert_torch.py

# Kernels against float64, on an NVIDIA GPU; prints the worst errors.
test-gpu: $(VENV)/dev
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[cuda]'
	$(BIN)/python -m pytest tests/kernels/test_suite.py tests/kernels/test_gpu.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# The claim itself: both main arms from scratch, five seeds each, and the table of all modes. On one GPU; EXTRA=tpu for
# a TPU. Stopped, it goes on where it was.
EXTRA ?= cuda
needles: $(VENV)/core
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[$(EXTRA)]'
	PYTHON=$(BIN)/python bash experiments/needles.sh main

notebook: $(VENV)/dev
	$(BIN)/jupytext --to ipynb --update --output colab/quickstart.ipynb colab/quickstart.py

$(VENV)/python: Makefile
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/core: $(VENV)/python requirements.txt pyproject.toml
	$(BIN)/python -m pip install --quiet -r requirements.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/core
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
