# What a checkout can do. Everything runs in a virtual environment of its own, made on first use from the pinned stack:
#   make demo    the quickstart on real cells, into demo/
#   make test    all tests that need no GPU and no network
#   make tutorials    the notebooks, each whole and within two minutes, and the seconds of each
#   make tutorials TUTORIALS=--overwrite    the same, and stores what they print and draw, tidied by tutorials/conftest.py
#   make docs    the documentation, into docs/_build/html
#   make lint    style, formatting and types
#   make test-lowest, make test-newest    the tests on the lowest versions declared, on the newest that pip finds
#   make test-slow    the tests that take minutes: the notebooks with another model, and more damaged files
#   make test-no-torch    the tests of what works without torch: check, tokenize, tables and plots
#   make test-archive    the tests of the archive of the source, in the folder that it unpacks to
#   make dist    the archives for the package index, checked; the wheel runs the README in a fresh environment
# Another interpreter: make test PYTHON=python3.12. Another environment: make test VENV=/path/to/one.
# Tests run in one process per core, at most four, each of which takes 1 to 2 GB: make test WORKERS=1 for fewer.
# On Linux pip takes torch for CUDA; the small one: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= logical
TUTORIALS ?=
CONSTRAINTS ?= constraints.txt
PACKAGE ?= --editable .
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS))

.PHONY: demo test test-slow test-lowest test-newest test-no-torch test-archive tutorials docs dist lint clean

demo: $(VENV)/.runs
	$(BIN)/python tutorials/quickstart.py

test: $(VENV)/.tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --durations 0 --numprocesses $(WORKERS) --maxprocesses 2

# Each in an environment that is made anew, since what is newest changes from day to day.
test-lowest: CONSTRAINTS := constraints-lowest.txt
test-newest: CONSTRAINTS :=
test-lowest test-newest: test-%:
	rm -rf .venv-$*
	$(MAKE) test VENV=.venv-$* CONSTRAINTS=$(CONSTRAINTS)

# A computer that only looks at results: the same environment, and then no library that runs a network.
WITHOUT_TORCH := $(addprefix tests/,core pp get pl datasets test_adata.py test_packaging.py test_results.py test_settings.py)
test-no-torch:
	rm -rf .venv-no-torch
	$(MAKE) .venv-no-torch/.tests VENV=.venv-no-torch
	.venv-no-torch/bin/python -m pip uninstall --quiet --yes torch transformers accelerate peft
	.venv-no-torch/bin/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile $(WITHOUT_TORCH)

test-archive: $(VENV)/.builds
	rm -rf build/archive
	$(BIN)/python -m build --sdist --outdir build/archive
	tar --extract --file build/archive/*.tar.gz --directory build/archive --strip-components 1
	$(MAKE) --directory build/archive test VENV=.venv

tutorials: $(VENV)/.notebooks
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout 300 --durations 0 \
	  --numprocesses $(WORKERS) --maxprocesses 2 $(TUTORIALS) tutorials

docs: $(VENV)/.documents
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

dist: $(VENV)/.builds
	rm -rf dist .venv-dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(MAKE) .venv-dist/.runs VENV=.venv-dist PACKAGE="$$(echo dist/*.whl)"
	.venv-dist/bin/python -P tests/installed.py

lint: $(VENV)/.lints
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-no-torch .venv-dist demo docs/_build docs/generated build dist

# Each stamp says that the environment holds what one of the targets needs; a change of the pins makes it anew.
PINS := pyproject.toml $(CONSTRAINTS)

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "gfx needs Python 3.11 or newer; '$(PYTHON)' is not. Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Dependency groups are read by pip 25.1 and newer.
$(VENV)/.pip: | $(BIN)/python
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	@touch $@

# torch by itself and first, so that it can come from an index of its own; what it needs follows from the usual one.
$(VENV)/.runs: $(PINS) | $(VENV)/.pip
	@echo "Installing the $(if $(CONSTRAINTS),versions of $(CONSTRAINTS),newest versions) into $(VENV): some minutes, once."
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(PIP) $(PACKAGE)
	@touch $@

$(VENV)/.tests: $(VENV)/.runs
	$(PIP) --editable ".[dask,lora,search]" --group test
	@touch $@

$(VENV)/.notebooks: $(VENV)/.tests
	$(PIP) --editable ".[notebook]" --group tutorials
	@touch $@

$(VENV)/.documents: $(VENV)/.runs
	$(PIP) --editable ".[train]" --group doc
	@touch $@

# Types are checked against those of the libraries, which have to be there.
$(VENV)/.lints: $(VENV)/.runs
	$(PIP) --group dev
	@touch $@

$(VENV)/.builds: $(PINS) | $(VENV)/.pip
	$(PIP) --group dist
	@touch $@
