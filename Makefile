# Needs python3.11 (or PYTHON=...) with venv and pip. Everything else is installed into .venv, once:
# a stamp remembers pyproject.toml, constraints.txt, PYTHON and TORCH, and a ready .venv is kept.
#
#   make demo                        the main job: a sweep on the digits, about 5 minutes
#   make test | test-all | lint | bench | clean
#   make demo TORCH=torch==2.12.0    another torch: a version, a wheel's path or a URL

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))) python3.11)
PINNED_TORCH := torch==2.13.0
TORCH ?= $(PINNED_TORCH)
SPACE ?= tune_spaces/digits_rollout.yaml

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
KEY := $(shell { cat pyproject.toml constraints.txt; $(PYTHON) --version; echo "$(TORCH)"; } 2>&1 | cksum | tr ' ' '-')
READY := .venv/.ready-$(KEY)
READY_DEV := .venv/.ready-dev-$(KEY)
CONSTRAINTS := .venv/constraints.txt

export PRE_COMMIT_HOME := $(CURDIR)/.venv/.pre-commit

.PHONY: demo install install-dev test test-slow test-browser test-all browser screenshots lint bench clean

demo: $(READY)
	@$(BIN)/raysched tune $(SPACE)

install: $(READY)

install-dev: $(READY_DEV)

# torch goes first and by its exact version: resolving it together with the rest could replace a
# CPU build by a CUDA one. The constraints hold for it, too, less their own line for torch when
# TORCH names another.
$(READY):
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "error: $(PYTHON) is not a Python 3.11 to 3.13 with venv and pip;" \
	       "install it (Debian: apt-get install python3.11-venv) or say PYTHON=..." >&2; exit 2; }
	@echo "setting up .venv with $(TORCH): a few minutes, this once"
	@if [ -x $(BIN)/python ] && ! [ "$$($(BIN)/python --version 2>&1)" = "$$($(PYTHON) --version 2>&1)" ]; \
	  then $(PYTHON) -m venv --clear .venv; else $(PYTHON) -m venv .venv; fi
	@if [ "$(TORCH)" = "$(PINNED_TORCH)" ]; then cp constraints.txt $(CONSTRAINTS); \
	  else grep -v '^torch==' constraints.txt > $(CONSTRAINTS); fi
	@$(PIP) -c $(CONSTRAINTS) "$(TORCH)"
	@$(PIP) -c $(CONSTRAINTS) -e .
	@rm -f .venv/.ready-*
	@touch $@

$(READY_DEV): $(READY)
	@$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

test: $(READY_DEV)
	@$(BIN)/python -m pytest -q -m "not slow and not browser" -n 2 --dist loadgroup

test-slow: $(READY_DEV)
	@$(BIN)/python -m pytest -q -m "slow and not browser"

test-browser: $(READY_DEV) browser
	@$(BIN)/python -m pytest -q -m "browser"

# Chromium from Debian's packages; where that is not possible the tests skip and say so.
browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core </dev/null >/dev/null; \
	else echo "no Chromium: the browser tests will skip; install it (Debian: apt-get install chromium)" >&2; fi

# The pictures of MLflow's pages that the README shows.
screenshots: $(READY_DEV) browser
	@RAYSCHED_SCREENSHOTS=docs $(BIN)/python -m pytest -q -m "browser"

# CI has just run the fast tests and says TEST_ALL_SKIP_FAST=1, so that they don't run twice.
test-all: $(if $(TEST_ALL_SKIP_FAST),,test) test-slow test-browser

lint: $(READY_DEV)
	@$(BIN)/pre-commit run --all-files --show-diff-on-failure

bench: $(READY_DEV)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf .venv build dist raysched.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
