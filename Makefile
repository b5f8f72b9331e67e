# `make help` lists the targets. Each makes the environment that it needs, with Python 3.10 or newer, and gcc for the kernels.

PYTHON ?= python3
VENV ?= .venv
VENV_COMPAT ?= .venv-compat
PYTEST_ARGS ?=
BENCH_ARGS ?=
TEXT ?=
CARD ?=

PYTEST = -m pytest -q
FAST = -m "not full"
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo publish-example test test-full test-compat sanitize lint bench clean venv
.DELETE_ON_ERROR:

# $(call install,FOLDER,CONSTRAINTS): a virtual environment with hf_fff, editable. torch comes first and alone, so that
# nothing else can bring in another build of it.
define install
@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "hf_fff needs Python 3.10 or newer: make PYTHON=...")'
@test -x "$(1)/bin/python" || $(PYTHON) -m venv "$(1)"
@echo "Installing hf_fff into $(1); the first time this takes minutes."
@"$(1)/bin/python" -m pip install -qq -c "$(2)" torch
@"$(1)/bin/python" -m pip install -qq -c "$(2)" -e ".[dev]"
@touch "$(1)/.stamp"
endef

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(VENV_COMPAT)/.stamp: pyproject.toml constraints.txt
	@mkdir -p "$(VENV_COMPAT)"
	@sed -E '/^(transformers|huggingface_hub)=/d' constraints.txt > "$(VENV_COMPAT)/constraints.txt"
	@printf '%s\n' 'transformers==5.17.*' 'huggingface_hub<2' >> "$(VENV_COMPAT)/constraints.txt"
	$(call install,$(VENV_COMPAT),$(VENV_COMPAT)/constraints.txt)

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON=python3.12, VENV=folder, VENV_COMPAT=folder, PYTEST_ARGS=\"-n 2 -k name\", BENCH_ARGS=\"--fff 8x8\""

venv: $(VENV)/.stamp ## make or refresh the environment
	@:

demo: $(VENV)/.stamp ## convert and calibrate a real model, compare and time it; TEXT=file calibrates on your own text
	@"$(VENV)/bin/python" examples/demo.py $(if $(TEXT),--text "$(TEXT)")

publish-example: $(VENV)/.stamp ## the demo's model converted, measured, carded, pushed to a hub on this machine and loaded back; CARD=file keeps the card
	@"$(VENV)/bin/python" examples/publish.py $(if $(CARD),--card "$(CARD)")

test: $(VENV)/.stamp ## the fast tests
	@"$(VENV)/bin/python" $(PYTEST) $(FAST) $(PYTEST_ARGS)

test-full: $(VENV)/.stamp ## all tests
	@"$(VENV)/bin/python" $(PYTEST) $(PYTEST_ARGS)

test-compat: $(VENV_COMPAT)/.stamp ## the fast tests with the oldest supported transformers
	@"$(VENV_COMPAT)/bin/python" $(PYTEST) $(FAST) $(PYTEST_ARGS)

sanitize: ## the C++ core of the kernels under ASan and UBSan, with each instruction set of this machine; needs no Python
	@mkdir -p build
	@$(CXX) -g -O1 -std=c++20 -fsanitize=address,undefined -fno-sanitize-recover=undefined -pthread -Ikernels \
		kernels/tests/check.cpp kernels/cpu/fff.cpp -o build/check
	@for isa in avx512 avx2 baseline; do HF_FFF_ISA=$$isa build/check || exit 1; done

lint: $(VENV)/.stamp ## ruff and mypy
	@"$(VENV)/bin/python" -m ruff check --quiet .
	@"$(VENV)/bin/python" -m ruff format --check --quiet .
	@"$(VENV)/bin/python" -m mypy --no-error-summary hf_fff

bench: $(VENV)/.stamp ## time one layer on this machine
	@"$(VENV)/bin/hf-fff" bench layer $(BENCH_ARGS)

clean: ## remove caches and build outputs; the environments stay
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	@find hf_fff tests examples -type d -name __pycache__ -prune -exec rm -rf {} +
