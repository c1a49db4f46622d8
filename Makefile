# make demo   sets up .venv and runs the whole pipeline on the embedded demo
# make test   sets up .venv and runs the fast tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all lint clean

setup: .venv/.done

# torch comes first, from constraints.txt, so that nothing else pulls another build of it.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: setup
	$(BIN)/sd3pipe demo demo

# Tests bring their own parallelism: one thread for each of two workers.
test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: setup
	$(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build dist *.egg-info demo
