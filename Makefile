# make demo   sets up .venv and runs the whole pipeline on the embedded demo
# make test   sets up .venv and runs the fast tests; make test-long those that take about a second or more
# make wheel  builds dist/sd3pipe-VERSION-py3-none-any.whl
# make pin    writes what .venv holds into constraints.txt, after an upgrade there
PYTHON ?= python3
BIN := .venv/bin

unexport PYTHONDONTWRITEBYTECODE  # what one process has compiled, the others take

.PHONY: setup demo test test-long test-all lint wheel pin clean

setup: .venv/.done

# torch comes first, from constraints.txt, so that nothing else pulls another build of it. Modules are compiled when they
# are first imported: all of them take two minutes more.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[test]'
	touch $@

demo: setup
	$(BIN)/sd3pipe demo demo

# Tests bring their own parallelism: one thread for each of two workers.
test: setup
	$(BIN)/python -m pytest -n 2 -m "not long and not slow and not gpu"

test-long: setup
	$(BIN)/python -m pytest -n 2 -m "long and not slow and not gpu"

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadscope

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

pin: setup
	$(BIN)/python scripts/write_constraints.py > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf .venv build dist *.egg-info demo
