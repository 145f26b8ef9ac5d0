# Everything starts from a bare machine: Python 3.11 to 3.13 with venv, and gcc.
#
#   make serve                     the model in the box, at http://127.0.0.1:8000
#   make serve ARGS="MODEL --port 9000"
#   make test ARGS="-k scheduler"

SHELL := /bin/bash
# The first interpreter that runs and fits; a shim on PATH may stand for one that is not there.
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
    "$$python" -c '$(FITS)' 2>/dev/null && { echo "$$python"; break; }; done)
# Where to take torch from. Empty means pip's own index. Where that one brings the CUDA build and
# the CPU build is wanted: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS ?=

PINS := ci/requirements-dev.txt
STAMP := .venv/.installed
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help install serve chat test check eval bench clean

help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(STAMP) ## .venv with the pinned torch, the package (editable) and its tools

# torch first and by itself: the ranges of pyproject.toml then find it there and bring no other build.
$(STAMP): pyproject.toml setup.py $(PINS) kernels_cpu/build.py $(wildcard kernels_cpu/csrc/*)
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.11 to 3.13 with venv was found (Debian: apt install python3-venv)." \
	    "Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@echo "[1/4] virtual environment in .venv"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@echo "[2/4] torch (some minutes the first time)"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' $(PINS)) $(QUIET)
	@echo "[3/4] build tools"
	@$(PIP) install -c $(PINS) setuptools $(QUIET)
	@echo "[4/4] trimaran with its server and development tools"
	@$(PIP) install -c $(PINS) --no-build-isolation -e '.[server,dev]' $(QUIET)
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install --no-deps triton==$(TRITON) $(QUIET)
	@touch $@

# Which Triton compiles and interprets the kernels for GPUs, where torch has brought none.
TRITON := 3.9.0

# One line a package is enough where nobody watches.
QUIET := $(if $(CI),--progress-bar off,)

serve: install ## the OpenAI-compatible server (ARGS="MODEL --option …")
	@$(BIN)/trimaran serve $(ARGS)

chat: install ## talk to the model in the terminal
	@$(BIN)/trimaran chat $(ARGS)

test: install ## the tests that need neither much time nor an accelerator
	@$(BIN)/pytest -m 'not slow and not device' $(ARGS)

check: install ## format, lint, types, layers, leaks, sizes
	@ci/check

eval: install ## accuracy of the model in the box on its closed world
	@$(BIN)/python tools/default_model/evaluate.py $(ARGS)

bench: install ## trimaran bench (ARGS="throughput …")
	@$(BIN)/trimaran bench $(ARGS)

clean: ## caches and build outputs; .venv stays (rm -rf .venv)
	@rm -rf build dist *.egg-info .ci/cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
