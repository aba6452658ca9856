# make demo   quantize a real model and see what it cost
# make test   lint, types and the CPU test suite
# make families   docs/FAMILIES.md: every type of transformers tried as a tiny model, in about an hour of a core
# make tables   the documents' tables of figures, from the rows in benchmarks/results
# make picture   the picture of a report in README.md, from the checkpoint that make demo makes; needs Chromium
# make docs   the documentation as a site in build/site
#
# Both make the environment in .venv on their first run and reuse it afterwards. It needs Python 3.11 and a C++
# compiler; where there is a GPU and nvcc too, setup.py builds the CUDA extension.
#   PYTHON=python3.12          another interpreter
#   TORCH=torch==2.12.0        another torch, before .venv exists

BIN := .venv/bin
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
TORCH ?= $(shell grep '^torch==' constraints.txt)
# "0" leaves the extension out: it would compile for minutes and nothing here could run it.
ifndef LOWBIT_CUDA
export LOWBIT_CUDA := $(shell nvidia-smi -L >/dev/null 2>&1 || echo 0)
endif
INSTALLED := pyproject.toml $(wildcard setup.py quant/kernels/csrc/* */__init__.py)

.PHONY: help env demo test families tables picture docs lint format gpu-test clean

help:
	@sed -n 's/^# *\(make .*\)/\1/p' Makefile

env: .venv/lowbit.stamp

demo: env
	$(BIN)/quantize demo --method awq --output demo-awq --overwrite
	$(BIN)/quantize-eval perplexity demo-awq --baseline demo --text builtin
	$(BIN)/quantize-eval generate demo-awq --baseline demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not gpu and not slow" --durations=10

families: env
	$(BIN)/python -m tests.families.table

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

tables: env
	$(BIN)/python -m benchmarks.tables

picture: env
	$(BIN)/quantize-report demo-awq
	$(BIN)/python scripts/picture.py demo-awq/report.html docs/images/report.png

docs: env
	$(BIN)/mkdocs build --strict

gpu-test: env
	$(BIN)/python -m pytest -q -m gpu --durations=10

clean:
	rm -rf build dist *.egg-info demo-awq .pytest_cache .ruff_cache .mypy_cache .venv/lowbit.stamp
	find . -name .venv -prune -o \( -name __pycache__ -o -name '_C*.so' \) -print0 | xargs -0 rm -rf

# The packages: torch first and alone, because anything that asks for it more loosely takes a newer build.
.venv/packages.stamp: constraints.txt
	@test -n "$(PYTHON)" || { echo "lowbit needs Python 3.11 or later: none found as python3.11 or python3"; exit 1; }
	@test -x $(BIN)/python || { echo "Making .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@echo "Installing $(TORCH) and what constraints.txt names (a few minutes, once)"
	@$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@$(BIN)/pip install -q --disable-pip-version-check -r .venv/constraints.txt
	@touch $@

# lowbit itself, editable; again when a package is added or the extension changes.
.venv/lowbit.stamp: .venv/packages.stamp $(INSTALLED)
	@echo "Installing lowbit into .venv"
	@$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
