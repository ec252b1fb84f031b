# make demo: train two small CNNs, merge them, print the table.   make test: everything that CI runs.
# make bench: ratios of times and memory, written into docs/performance.md.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet

.PHONY: demo test bench clean

demo: $(VENV)/.examples
	$(VENV)/bin/python examples/digits.py

test: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest

bench: $(VENV)/.dev
	$(VENV)/bin/python benchmarks/speed.py --json bench.json --write docs/performance.md

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[examples]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.examples

clean:
	rm -rf $(VENV)
