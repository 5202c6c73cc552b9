# make demo: attribute a real model, end to end.   make test: everything the tests need, then the tests.   make help: the rest.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint check unit bench test-gpu bench-gpu benchfull lds soak clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 10

venv: .venv/.dev ## a virtual environment with all that development needs

# torch first, by pip: its index may serve a CPU or a GPU build of the same version. The rest by uv, in seconds.
.venv/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("tda needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch uv
	$(UV) --editable .
	@touch $@

.venv/.dev: .venv/.run
	$(UV) --editable '.[dev]'
	@touch $@

demo: .venv/.run ## trains on the UCI digits, attributes, prints the answer and where the report is
	$(BIN)/tda run docs/examples/digits.toml

test: .venv/.dev ## installs what tests need (Debian packages too), then lint, types, import contracts, tests
	tests/system-packages.sh
	$(MAKE) --no-print-directory lint unit

lint: .venv/.dev ## ruff, mypy --strict, import contracts, bandit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --severity-level medium --recursive tda tasks flows infra

check: .venv/.dev ## lint, and known vulnerabilities in what is depended on; says so where they could not be looked up
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m tests.audit

unit: .venv/.dev ## the tests alone: the mathematics on all cores, one test each, then what starts clusters and servers, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "pure and not soak"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not pure and not soak"

# What the benchmarks compare with lives apart, so that it can never be imported by accident.
.venv-peers/.done: pyproject.toml constraints.txt | .venv/.run
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/uv pip install --quiet --python .venv-peers/bin/python --constraint constraints.txt --editable '.[peers]'
	@touch $@

bench: .venv/.dev .venv-peers/.done ## against Kronfluence and devinterp in pairs, solvers against each other and against one by one, retraining; a GPT with TDA_CASES=folder (20 minutes more)
	$(BIN)/python -m tests.benchmarks.solvers
	$(BIN)/python -m tests.benchmarks.lds --timing
	$(BIN)/python -m tests.benchmarks.lds --timing --network cnn
	$(BIN)/python -m tests.benchmarks.covariance
	$(BIN)/python -m tests.benchmarks.sampling
	$(BIN)/python -m tests.benchmarks.stages
	$(BIN)/python -m tests.benchmarks.memory
	$(BIN)/python -m tests.benchmarks.compare

test-gpu: .venv/.dev ## the numerical tests on a GPU; says so and fails where there is none
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no GPU that torch can use on this machine: nothing is tested; tda doctor says why")'
	$(BIN)/python -m pytest -m gpu

bench-gpu: .venv/.dev ## fits and scores on a GPU beside the processor's; says so and fails where there is none
	$(BIN)/python -m tests.benchmarks.gpu

benchfull: .venv/.dev .venv-peers/.done ## the same on all sequences, both sides also on oneDNN and in bfloat16 (hours)
	$(BIN)/python -m tests.benchmarks.compare --all --sequences 2000

lds: .venv/.dev ## LDS by retraining: the ladder on the digits, and SOURCE where training stopped early; Bayesian influence beside it (15 minutes)
	$(BIN)/python -m tests.benchmarks.lds
	$(BIN)/python -m tests.benchmarks.source
	$(BIN)/python -m tests.benchmarks.bif

soak: .venv/.dev ## the tests that take minutes
	$(BIN)/python -m pytest -m soak

clean: ## removes what can be made again; ./store stays
	rm -rf .venv .venv-peers build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
