# What a checkout can do. Everything runs in a virtual environment of its own, made on first use from the pinned stack:
#   make demo    the quickstart on real cells, into demo/
#   make test    all tests that need no GPU and no network
#   make docs    the documentation, into docs/_build/html
#   make lint    style and formatting
# Another interpreter: make test PYTHON=python3.12. Another environment: make test VENV=/path/to/one.
# Tests run in one process per core, at most four, each of which takes 1 to 2 GB: make test WORKERS=1 for fewer.
# On Linux pip takes torch for CUDA; the small one: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= logical
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test docs lint clean

demo: $(VENV)/.runs
	$(BIN)/python tutorials/quickstart.py

test: $(VENV)/.tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile

docs: $(VENV)/.documents
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

lint: $(VENV)/.lints
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv demo docs/_build docs/generated build dist

# Each stamp says that the environment holds what one of the targets needs; a change of the pins makes it anew.
PINS := pyproject.toml constraints.txt

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "gfx needs Python 3.11 or newer; '$(PYTHON)' is not. Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch by itself and first, so that it can come from an index of its own; what it needs follows from the usual one.
$(VENV)/.runs: $(PINS) | $(BIN)/python
	@echo "Installing the tested stack into $(VENV): some minutes, once."
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.tests: $(VENV)/.runs
	$(PIP) --editable ".[test]"
	@touch $@

$(VENV)/.documents: $(VENV)/.runs
	$(PIP) --editable ".[doc]"
	@touch $@

$(VENV)/.lints: $(PINS) | $(BIN)/python
	$(PIP) ruff
	@touch $@
