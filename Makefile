PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Byte code is kept, whatever the shell says: the tests start a hundred processes, and each would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run test others lint types install

run: $(VENV)/.installed  ## install, then run the quickstart pipeline on the built-in model
	$(BIN)/sagellm run pipelines/quickstart.yaml

test: $(VENV)/.tested  ## everything CI checks; the soak goes first on each core, since it compares waits
	$(BIN)/pytest tests/soak & soak=$$!; nice -n 19 $(MAKE) -j 3 lint types others || { kill $$soak 2>/dev/null; exit 1; }; wait $$soak

others: $(VENV)/.tested
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/soak

lint: $(VENV)/.tested
	$(BIN)/ruff check .

types: $(VENV)/.tested
	@mkdir -p .cache/typing && ln -sfn ../.. .cache/typing/sageLLM
	$(BIN)/mypy -p sageLLM

install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard backends/cpu/native/*.[ch]) | $(BIN)/python
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@
