# Everything a newcomer needs is `make demo` and `make test`; `make help` lists the rest.

PYTHON := .venv/bin/python
# many tests wait for other processes
JOBS := 3
DRIVERS := $(wildcard drivers/*/*)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench kit bench-scale soak torture faults fuzz format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what the project needs: Debian packages (as root) and .venv/
	@share/setup.sh lab

demo: setup ## back up a real guest while it runs, restore every increment, boot the last one
	@$(PYTHON) share/lab/demo.py

test: setup check ## all checks and all tests, unattended
	@$(PYTHON) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: setup ## linters, types, layers
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports --no-logo
	@shellcheck $$(git ls-files '*.sh') .ci/run

bench: ## the benchmark table (QUICK=1: with a smaller disk)
	@share/setup.sh lab bench
	@PYTHONPATH=share/lab $(PYTHON) -m tests.bench $(if $(QUICK),--quick)

kit: setup ## the whole conformance kit on every kind of store, more than an hour (WHERE="rsync restic-s3")
	@PYTHONPATH=share/lab $(PYTHON) tests/contract/whole_kit.py $(WHERE)

bench-scale: setup ## lists, imports and dispatch with 10,000 VMs on the dummy hypervisor (VMS=… BACKUPS=… QUEUED=…)
	@PYTHONPATH=share/lab $(PYTHON) -m tests.bench.scale $(if $(VMS),--vms $(VMS)) $(if $(BACKUPS),--backups $(BACKUPS)) $(if $(QUEUED),--queued $(QUEUED))

soak: setup ## back up, merge, delete and restore for long, and see that the daemon does not grow (CYCLES=1000 SEED=…)
	@PYTHONPATH=share/lab $(PYTHON) -m tests.faults.soak $(if $(CYCLES),--cycles $(CYCLES)) $(if $(SEED),--seed $(SEED))

torture: setup ## kill daemon and drivers at random moments (MINUTES=10 SEED=…)
	@PYTHONPATH=share/lab $(PYTHON) -m tests.faults.torture $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

faults: setup ## run all tests, slow ones as well, and write share/doc/fault-table.md
	@$(PYTHON) -m pytest --numprocesses $(JOBS) --dist loadfile --whole-matrix --fault-table $(PYTEST_ARGS)

fuzz: setup ## give nonsense to all that reads from outside (SECONDS=60 for each TARGET=…)
	@$(PYTHON) -m tests.security.fuzz $(TARGET) $(if $(SECONDS),--seconds $(SECONDS))

format: setup ## rewrite the code in the project's format
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

clean: ## remove what the targets made
	rm -rf build dist .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
