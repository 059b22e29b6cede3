# Everything installs from PyPI into .venv; nothing else is fetched.
#   make demo PYTHON=python3.12     with another interpreter
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
NODES := $(addprefix tests/chaos/test_,two_nodes.py elastic.py other_workers.py taken_over.py \
	autoscaled.py doctor_nodes.py job_nodes.py slurm.py services.py)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-chaos test-nodes test-sweeps chaos soak sweep experiments methods collapse serving screenshots docs lint format

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(READY) ## make .venv with the tested versions

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "raydmd needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) -V 2>&1); try make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the tested versions into .venv (a few minutes, 7 GB with CUDA's libraries) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
		-c constraints.txt -e '.[dev]'
	@touch $@
	@echo "installed: $$($(BIN)/python -m raydmd --version)"

demo: $(READY) ## install, then distil the tiny Wan2.2 pipeline and write its report
	$(BIN)/python experiments/phased_wan22.py

test: $(READY) ## install, then run the tests, side by side; the slower ones have targets of their own
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not chaos and not sweep" -n auto --dist worksteal

test-chaos: $(READY) ## processes, disks and servers that die in mid-run (ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "chaos and not sweep" -n 2 --dist worksteal $(addprefix --ignore=,$(NODES))

test-nodes: $(READY) ## nodes that go and come back, other numbers of workers, folders that change hands
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(NODES)

test-sweeps: $(READY) ## sweeps that are stopped, killed and joined by a second cluster (twenty minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m sweep

chaos: $(READY) ## kill everything at every moment, 46 faults, and see that runs end the same
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.chaos

soak: $(READY) ## 24 faults at random moments, and the quality after them (40 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.chaos.soak

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

docs: $(READY) ## the pages, with the reference made of the code, into build/docs; a warning fails
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "docs: build/docs/index.html"

screenshots: $(READY) ## the gallery's runs and every picture of README and docs (ten minutes; wants chromium)
	$(BIN)/python -m docs.make_screenshots

lint: $(READY) ## ruff, mypy --strict, docstrings, known vulnerabilities (where the network has them)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	.ci/docstrings
	@$(BIN)/python .ci/audit

format: $(READY) ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
