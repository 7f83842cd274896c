# Every target does its own set-up in $(VENV); the first run of any of them takes a few minutes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CORES := $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')

.PHONY: help demo test check format docs bench clean

help:
	@echo "make demo    prune, federate and evaluate the embedded model (a few minutes)"
	@echo "make test    run the tests"
	@echo "make check   ruff and mypy"
	@echo "make docs    write the generated pages of docs/ again"
	@echo "make bench   run the benchmarks; FULL=1 takes the largest matrices too"
	@echo "make clean   remove the virtual environment and caches"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "prufed needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/prufed demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal --ignore tests/benchmarks

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python tests/docs/generate.py

bench: $(INSTALLED)
	BENCH_FULL=$(FULL) $(BIN)/python -m pytest tests/benchmarks -q -s

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
