# Every target sets up .venv by itself; all it needs is python3 (3.10 or newer), make and, for kernels, g++.
# Another interpreter: make test PYTHON=python3.12. Arguments for the benchmark: make bench ARGS="ops".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two test processes on two cores: without this each would start a thread per core.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: quickstart test test-slow lint format typecheck bench clean

quickstart: $(READY)
	$(BIN)/fusiontree quickstart $(ARGS)

test: lint typecheck
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: $(READY)
	$(PYTEST) -m "slow and not gpu" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/fusiontree bench $(ARGS)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The stamp is renewed when the metadata or the tested versions change, and only after everything is installed.
# --no-compile: torch alone has thousands of modules, of which an import compiles the few hundred that it needs.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("FusionTree needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments: install its venv module (python3-venv on Debian)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
