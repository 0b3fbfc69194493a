# The commands of this repository; `make help` lists them. Every target that needs .venv makes it first.
# PYTHON=python3.12 chooses the interpreter of a new .venv, FRESH=1 rebuilds an existing one.

.DEFAULT_GOAL := help
.PHONY: help setup test chaos quickstart lint format types security coverage bench teacher-env samples lock clean
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OUT ?= runs/quickstart

# No model hub in tests or in the quickstart, whose teachers and data ship with the tree.
export HF_HUB_OFFLINE := 1
# Ray's dashboard runs code that is posted to it; with a token only this user can.
export RAY_AUTH_MODE := token
# glibc gives freed blocks back to the system and asks for them again at every step; read when Python starts.
# 1 GiB, as actors/cluster.py sets for Ray's workers, is above every tensor of the quickstart.
MALLOC := MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824
# The parts whose every line and branch a test has to reach.
CORE := nexus/student/*,nexus/adapters/*,nexus/training/*,nexus/profiling/*,nexus/towers/*

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv from constraints.txt (CPU build of torch unless there is a GPU)
	@echo "setup: .venv is up to date"

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh nexus/__init__.py
	@PYTHON="$(PYTHON)" FRESH="$(FRESH)" scripts/setup.sh
	@touch $@

ifdef FRESH
.PHONY: $(STAMP)
endif

test: $(STAMP) ## Run the suite with coverage; the core has to reach 100 % of lines and branches
	@$(BIN)/python -m pytest -m "not chaos" --cov --cov-report=
	@$(BIN)/python -m coverage report --format=total | sed 's/^/coverage of nexus, actors and jobs: /; s/$$/ %/'
	@$(BIN)/python -m coverage report --include='$(CORE)' --fail-under=100

chaos: $(STAMP) ## Kill teachers, trainers and drivers of whole runs, which have to go on as if nothing had been
	@$(BIN)/python -m pytest -m chaos

coverage: $(STAMP) ## Show what the last `make test` did not reach, also as htmlcov/index.html
	@$(BIN)/python -m coverage html -q
	@$(BIN)/python -m coverage report

quickstart: $(STAMP) ## Distil four small teachers into one student: minutes on two cores; ends with the table and the report
	@$(MALLOC) $(BIN)/nexus quickstart --out $(OUT)

lint: $(STAMP) ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP) ## Rewrite files to pass `make lint`
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP) ## Check types, strictly
	@$(BIN)/mypy

security: $(STAMP) ## Look for unsafe code, known vulnerabilities, secrets and machine paths
	@$(BIN)/bandit -q -c pyproject.toml -r nexus actors jobs scripts
	@$(BIN)/python scripts/audit.py
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_repository.py -k secret

bench: $(STAMP) ## Run the benchmarks (long); the quickstart over three seeds is one of them
	@for script in benchmarks/*.py; do echo "== $$script"; $(MALLOC) $(BIN)/python $$script; done

teacher-env: $(STAMP) ## Make the environment of a vendor's package: make teacher-env NAME=qwen-tts (or parler-tts)
	@scripts/teacher_env.sh "$(NAME)"

samples: $(STAMP) ## Rebuild the sample data and teachers (long; needs espeak-ng)
	@$(BIN)/python nexus/data/samples/make_data.py
	@$(MALLOC) $(BIN)/python nexus/data/samples/train_teachers.py

lock: $(STAMP) ## Renew constraints.txt for all Pythons (needs uv); rerun the tests before committing it
	@scripts/lock.sh

clean: ## Remove what checks and builds left behind; keeps .venv and runs
	@rm -rf build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
