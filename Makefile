# Everything a person needs after cloning. Each target makes the virtual environment it needs, and makes it anew
# when pyproject.toml has changed. Elsewhere: `make test VENV=/somewhere/venv PYTHON=python3.13`.
VENV ?= .venv
OUT ?= medmae-demo
BIN := $(VENV)/bin
READY := $(VENV)/.medmae-installed
SUITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(SUITS)' 2>/dev/null && echo $$p && break; done)
# Several test processes of one thread each: faster than one process of several, and no two fight over a core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8

.PHONY: help demo test test-slow test-all lint format docs viewer wheel clean
help:  ## Say what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## */\t/' | expand -t 12

demo: $(READY)  ## Cohort, pre-training, synthesis, evaluation and report in $(OUT); minutes on a CPU
	$(BIN)/medmae demo --out $(OUT)
	@echo "Look at what is in $(OUT)/, first the pages that end in .html (any browser, no network needed)."

test: $(READY)  ## The tests, without those that take long
	$(PYTEST) -m "not slow and not benchmark"

test-slow: $(READY)  ## The tests that take long
	$(PYTEST) -v -m "slow and not benchmark" || [ $$? -eq 5 ]  # 5: there are none

test-all: $(READY)  ## Every test
	$(PYTEST) -m "not benchmark"

lint: $(READY)  ## Style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## The documentation as a site in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

viewer:  ## The bundled image viewer of the reports anew, from npm, at the versions of web/package-lock.json
	npm --prefix web ci --ignore-scripts --no-audit --no-fund
	npm --prefix web run build

wheel: $(READY)  ## A wheel in dist/
	$(BIN)/python -m hatchling build --target wheel

clean:  ## Remove what the other targets made
	rm -rf $(VENV) web/node_modules site dist build .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "medmae needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c '$(SUITS)' || { echo "medmae needs Python 3.11, 3.12 or 3.13; $(PYTHON) is another" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev,docs]"
	@touch $@
