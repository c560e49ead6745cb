# The verbs of this project; `make` alone lists them. Each installs what it needs first.
# Options of the underlying program go into ARGS:  make test ARGS='tests/chunkstore -k header'
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup run stop test test-all test-stores check bench bench-meta
ARGS ?=
# What mounts without saying of what, or starts a service without naming a store.
MOUNTING = tests/mount tests/client/transport tests/atollfs
# Tests wait more than they work: as many processes share them as there are cores, up to four.
SHARED = --numprocesses logical --maxprocesses 4 --dist worksteal
# `make test` makes the same random choices each time; `make test-all` new ones, and prints their seed.
test: export ATOLL_TEST_SEED ?= 1

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install Debian packages that are missing, and .venv with the command .venv/bin/atoll
	@scripts/setup.sh runtime

run: setup ## format ./vol unless it is there, mount it at ./mnt, show what it does, leave it mounted
	@scripts/demo.sh

stop: ## unmount ./mnt
	@scripts/stop.sh

test: ## run all tests but the slow ones, real servers and mounts included
	@scripts/setup.sh runtime test
	.venv/bin/python -m pytest $(SHARED) -m 'not slow' --durations=10 $(ARGS)

test-all: ## run every test, those that mount on each kind of store too
	@scripts/setup.sh runtime test
	.venv/bin/python -m pytest $(SHARED) --durations=20 $(ARGS)
	$(if $(ARGS),,$(MAKE) test-stores)

test-stores: ## run what mounts through a service on SQLite, PostgreSQL and Redis
	@scripts/setup.sh runtime test
	@set -e; for store in sqlite postgresql redis; do \
	  echo "a service on $$store"; \
	  ATOLL_TEST_STORE=$$store .venv/bin/python -m pytest $(SHARED) -m 'not slow' $(MOUNTING) $(ARGS); \
	done

check: ## ruff, mypy and the rules about imports
	@scripts/setup.sh runtime test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: ## compare with JuiceFS, rclone mount and ext4
	@scripts/setup.sh runtime test bench
	.venv/bin/python bench/run.py $(ARGS)

bench-meta: ## compare operations on names with JuiceFS, on the same PostgreSQL and Redis
	@scripts/setup.sh runtime test bench
	.venv/bin/python bench/meta.py $(ARGS)
