# Run `make` for the list. Environments are made on first need and again when pyproject.toml changes.

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-parity lint bench clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 12

demo: .venv/.core ## Complete a Python function with the embedded model
	@.venv/bin/jaxserve generate "def read_lines(path):" --max-tokens 96 --seed 2

# Python 3.11 gets the last JAX that supports it, and a torch to compare with.
API := tests/jaxserve/test_api.py::test
PARITY_TESTS := tests/test_house.py tests/jaxserve/models \
	$(API)_greedy_generation_is_the_argmax_of_the_whole_forward \
	$(API)_a_list_gives_a_list_and_each_as_if_alone

# One process a core: most of a test's time goes to compiling and to starting commands.
PYTEST := python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: .venv/.dev ## Run the suite, then parity and generation on Python 3.11 where it is present
	.venv/bin/$(PYTEST) -m "not slow"
	@$(MAKE) --no-print-directory test-parity

test-full: .venv/.dev ## Run the suite with its slow tests
	.venv/bin/$(PYTEST)
	@$(MAKE) --no-print-directory test-parity

test-parity: .venv311/.parity ## Run parity and generation on Python 3.11 alone
	@if [ -x .venv311/bin/python ]; then \
		.venv311/bin/$(PYTEST) -m "not slow" $(PARITY_TESTS); \
	else \
		echo "no Python 3.11 here: the tests with JAX 0.10 and torch are left out"; \
	fi

lint: .venv/.dev ## Check style, types and import directions
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/lint-imports --no-cache

bench: .venv/.dev ## Measure decoding beside the peers that are installed
	.venv/bin/python benchmarks/decode.py

clean: ## Remove environments, builds and caches
	rm -rf .venv .venv311 build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.core: pyproject.toml
	@.ci/environment .venv --editable .
	@touch $@

.venv/.dev: pyproject.toml
	@.ci/environment .venv --editable '.[dev]'
	@.ci/cuda .venv
	@touch $@ .venv/.core

# Status 3: there is no Python 3.11, which is not a failure.
.venv311/.parity: pyproject.toml
	@ONLY=3.11 .ci/environment .venv311 --editable '.[dev,parity]' 'jax==0.10.2' || [ $$? = 3 ]
	@[ ! -d .venv311 ] || touch $@
