# SPDX-License-Identifier: Apache-2.0
# Everything from a clean clone with Python 3.11 and pip alone: make demo, make test.
# Overridable: PYTHON (makes the environment), VENV (its folder), ARGS (passed on to pytest, demo or bench), WORKERS (how
# many processes run the tests; 0: none but pytest's own, so that --pdb and -s work).

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell $(p) -c 'import venv' 2>/dev/null && echo $(p))) python3.11)
VENV    ?= .venv
ARGS    ?=
WORKERS ?= 2

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.vllm-specdecpp-installed
MODELS := qwen2.5-coder-1.5b qwen2.5-coder-0.5b
# A worker takes whole files, as their tests share engines; in the order of collection, the long ones (engines) first.
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
QUICK := -m "not slow and not network"
# A selection (-k ...) may find nothing in one of several pytest runs: its exit status is then 5.
MAY_BE_EMPTY = $(if $(ARGS),|| [ $$? -eq 5 ])

.PHONY: help venv models demo bench test test-v2 test-v033 test-slow lint check docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       fetch two small models, compare speculation off / draft_model / specdecpp on them"
	@echo "make test       unit and engine tests (no downloads but the environment), and test-v2"
	@echo "make test-v2    Model Runner V2 and the Triton kernels, interpreted on the CPU"
	@echo "make test-v033  the same under vLLM 0.33: its Python files over 0.32's CPU kernels"
	@echo "make test-slow  tests with the real models, and slow variants of what make test proves"
	@echo "make bench      the benchmark table; ARGS=... are the options of python -m benchmarks.campaign"
	@echo "make check      ruff and mypy"
	@echo "make docs       README and docs as a site, in build/site; a link that leads nowhere is an error"
	@echo "make venv       the environment alone, in $(VENV)"
	@echo "make clean      remove .venv and the caches of the tools; fetched models stay"

venv: $(STAMP)

# vLLM first: the package's own requirements then find the right torch and leave it alone.
# A Python without ensurepip (Debian's) gets its pip from its own pip.
$(STAMP): setup.py pyproject.toml vllm_specdecpp/setup/cpu_install.py
	test -x $(PY) && $(PY) -m pip --version >/dev/null || $(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install pip; }
	$(PY) -m vllm_specdecpp.setup.cpu_install
	$(PY) -m pip install -e '.[cpu,bench,train,docs,dev]'
	@touch $@

models: $(STAMP)
	@$(PY) -m benchmarks.models.fetch $(MODELS)

demo: models
	@$(PY) -m benchmarks.demo $(ARGS)

bench: models
	@$(PY) -m benchmarks.campaign $(ARGS)

test: $(STAMP)
	@$(PYTEST) $(QUICK) $(ARGS) $(MAY_BE_EMPTY)
	@$(MAKE) --no-print-directory test-v2

# A process each: what interprets Triton's kernels, and what watches them, is patched in for the whole process.
test-v2: $(STAMP)
	@$(PYTEST) $(QUICK) tests/v2 $(ARGS) $(MAY_BE_EMPTY)
	@$(PYTEST) --dist worksteal $(QUICK) tests/v2/kernels $(ARGS) $(MAY_BE_EMPTY)

# vLLM 0.33 on 0.32's CPU kernels, in an environment of its own.
test-v033: $(STAMP)
	@test -e build/v033/.vllm-specdecpp-installed || $(PY) tests/make_v033.py build/v033
	@$(MAKE) --no-print-directory VENV=build/v033 test

test-slow: models
	@$(PY) -m pytest -m "slow" $(ARGS) $(MAY_BE_EMPTY)
	@$(PY) -m pytest -m "slow" tests/v2 $(ARGS) $(MAY_BE_EMPTY)

lint: $(STAMP)
	@$(PY) -m ruff check .

check: lint
	@$(PY) -m mypy

docs: $(STAMP)
	@mkdir -p build/pages && ln -sfn $(CURDIR)/README.md $(CURDIR)/CHANGELOG.md $(CURDIR)/docs $(CURDIR)/benchmarks build/pages/
	@$(PY) -m mkdocs build --strict --clean --quiet
	@echo "build/site/index.html"

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
