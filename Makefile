# Everything runs in a virtual environment of its own; only python3 (3.11 or newer) and make are needed.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test test-store test-rest check check-router check-rest faults faults-begin faults-store faults-remote faults-router faults-serve lint bench clean

demo: $(VENV)/demo.installed
	$(BIN)/python -m tools.demo --out demo-out

# All tests, in two processes of one thread each, for two cores.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/dev.installed
	$(MAKE) --jobs 2 --keep-going test-store test-rest

test-store: $(VENV)/dev.installed
	$(BIN)/python -m pytest -q tests/pear_store

test-rest: $(VENV)/dev.installed
	$(BIN)/python -m pytest -q --ignore tests/pear_store

# Linters, and all tests but those marked slow, within a minute: two processes of one thread each, for two cores.
check: export OMP_NUM_THREADS = 1
check: $(VENV)/dev.installed
	$(MAKE) --jobs 2 --keep-going lint check-router check-rest

check-router: $(VENV)/dev.installed
	$(BIN)/python -m pytest -q -m 'not slow' tests/router

check-rest: $(VENV)/dev.installed
	$(BIN)/python -m pytest -q -m 'not slow' --ignore tests/router

# Faults in their full number: 300 kills, 1,000 flipped bits, a soak of two minutes, 1,200 simulated losses of power and 42 on a
# real ext4 (where root may mount one and strace is there); of remotes 1,000 kills, 100 restarts of a server,
# 100 random histories, and twice ten minutes of 8 pushers, 2 gcs and 4 cloners; every line of the router interrupted. Takes about
# 120 minutes, with `--jobs 3` less. What it found goes to docs/results/faults.log.
faults: export PEAR_FAULT_LOG = $(CURDIR)/docs/results/faults.log
faults: faults-store faults-remote faults-router faults-serve

faults-begin: $(VENV)/dev.installed
	git log -1 --format='commit %H' > docs/results/faults.log

faults-store: faults-begin
	PEAR_CRAFTED=1 PEAR_KILLS=300 PEAR_FLIPS=1000 PEAR_SOAK_S=120 PEAR_POWER_LOSSES=1200 PEAR_POWER_CUTS=42 \
		$(BIN)/python -m pytest \
		-k 'kill_9 or flipped_bits_are_never_handed_out_are or soak or power or crafted' tests/pear_store

faults-remote: faults-begin
	PEAR_REMOTE_KILLS=100 PEAR_REMOTE_RESTARTS=50 PEAR_REMOTE_SOAK_S=600 PEAR_REMOTE_EXAMPLES=100 PEAR_REMOTE_FLIPS=300 \
		$(BIN)/python -m pytest tests/pear_store/remote

faults-router: faults-begin
	PEAR_INTERRUPTS=1000000 PEAR_INTERRUPTED_CALLS=2000 PEAR_MANY_TASKS=20000 $(BIN)/python -m pytest \
		tests/router/test_interrupted.py tests/router/test_many_tasks.py
	PEAR_CLUSTER_DEATHS=1 PEAR_CLUSTER_ROWS=20000 $(BIN)/python -m pytest tests/cluster

faults-serve: faults-begin
	PEAR_SERVE_ANSWERS=20000 PEAR_SERVE_BODIES=100000 PEAR_SERVE_CASES=200 $(BIN)/python -m pytest \
		tests/router/serve/test_under_load.py tests/router/serve/test_fuzz.py
	$(BIN)/python -m benchmarks.serve.soak --seconds 900

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Needs the data and weights that benchmarks/README.md names, in ../shared.
bench: $(VENV)/dev.installed
	$(BIN)/python -m benchmarks.study.pear_tiny --data ../shared/data \
		--deit ../shared/weights/deit_tiny_patch16_224.safetensors --out benchmarks/results/pear_tiny.json
	for stage in shape knobs decay sharing across codes peers pixels; do $(BIN)/python -m benchmarks.study.run $$stage --shared ../shared || exit 1; done
	$(BIN)/python -m benchmarks.study.run final --shared ../shared --seeds 3
	$(BIN)/python -m benchmarks.study.report

$(VENV)/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build *.egg-info
