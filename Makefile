# make demo: train two small CNNs, merge them, print the table.   make test: everything that CI runs for each change.
# make nightly: examples, benchmarks and large networks.
# make docs: the documentation as a site in build/site.   make bench: ratios of times and memory, into docs/performance.md.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet

.PHONY: demo test nightly docs bench clean

demo: $(VENV)/.examples
	$(VENV)/bin/python examples/digits.py

test: docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

nightly: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m nightly

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

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
