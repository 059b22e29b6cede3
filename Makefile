# Everything installs from PyPI into .venv; nothing else is fetched.
#   make demo PYTHON=python3.12     with another interpreter
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo test test-sweeps sweep experiments methods collapse serving lint format

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(READY) ## make .venv with the tested versions

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "raydmd needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) -V 2>&1); try make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the tested versions into .venv (a few minutes, about 3 GB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
		-c constraints.txt -e '.[dev]'
	@touch $@
	@echo "installed: $$($(BIN)/python -m raydmd --version)"

demo: $(READY) ## install, then distil the tiny Wan2.2 pipeline and write its report
	$(BIN)/python experiments/phased_wan22.py

test: $(READY) ## install, then run the tests, side by side: all but chaos, then chaos
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not chaos and not sweep" -n auto --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "chaos and not sweep" -n 2 --dist worksteal

test-sweeps: $(READY) ## sweeps that are stopped, killed and joined by a second cluster (twenty minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m sweep

sweep: $(READY) ## twelve trials of Decoupled DMD's schedules on one teacher, to best, front, page and verdict (22 minutes)
	$(BIN)/python experiments/sweep_ca_dm_schedules.py

experiments: $(READY) ## every script of experiments/ on the zoo, 20 updates each (half an hour)
	@for script in $(filter-out experiments/sweep_%,$(wildcard experiments/*.py)); do \
		echo "== $$script"; \
		$(BIN)/python $$script --training.cycles=20 --evaluation.samples=32 --evaluation.grid=4 \
			--name=$$(basename $$script .py) --output=runs/experiments || exit 1; done

methods: $(READY) ## compare all methods on the zoo at equal compute (65 minutes)
	$(BIN)/python benchmarks/methods.py

collapse: $(READY) ## force a collapse and see the monitor stop it and roll it back (under half an hour)
	$(BIN)/python benchmarks/collapse.py

serving: $(READY) ## every claim about pools, as tables and JSON (20 minutes)
	@for name in hidden tax batching sharing wire fairness deaths soak; do \
		echo "== $$name"; $(BIN)/python benchmarks/serving/$$name.py || exit 1; done

lint: $(READY) ## ruff, mypy --strict, docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	.ci/docstrings

format: $(READY) ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
