# `make demo` runs the main job on a built-in default, `make test` passes the tests; both set up what they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= auto

.PHONY: setup demo test lint types wheel bench clean

setup: $(VENV)/dev.stamp

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/run.stamp
	$(BIN)/python examples/demo.py

build/assets/stamp: $(VENV)/dev.stamp tests/assets.py
	$(BIN)/python tests/assets.py build/assets
	touch $@

test: build/assets/stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and pyright cannot follow the mapping of formats/, quant/ and evals/, so they read a tree of links.
types: $(VENV)/dev.stamp
	rm -rf build/types
	mkdir -p build/types/weightsmith
	ln -s $(CURDIR)/weightsmith/* $(CURDIR)/formats $(CURDIR)/quant $(CURDIR)/evals build/types/weightsmith/
	$(BIN)/mypy

# The built wheel, installed alone and run outside the checkout: finds a package or a data file that was forgotten.
wheel: $(VENV)/dev.stamp
	rm -rf dist build/wheel
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/python -m venv --system-site-packages build/wheel
	build/wheel/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall dist/*.whl
	$(BIN)/python tests/wheel_check.py build/wheel/bin/weightsmith $(VENV)

bench: $(VENV)/dev.stamp build/assets/stamp
	$(BIN)/python -m benchmarks.convert

clean:
	rm -rf build dist $(VENV) *.egg-info
