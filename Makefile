# Front door. `make demo` and `make test` need Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test fast lint format size clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Quantize a trained lander: sweep, Pareto front, verified ONNX, FPGA cost (under a minute on two idle cores)
	$(BIN)/python benchmarks/demo.py

test: $(READY) lint ## Lint, types, all tests
	$(BIN)/python -m pytest -n 2

fast: $(READY) ## The tests without the slow ones
	$(BIN)/python -m pytest -n 2 -m 'not slow'

lint: $(READY) ## Format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## Reformat and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

size: ## The longest source files
	@wc -l quantkit/*.py quantkit/*/*.py hwmodel/*.py | sort -rn | head -16

clean: ## Remove the environment and what the demo wrote
	rm -rf $(VENV) demo_out

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=python3.12 or so"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)
