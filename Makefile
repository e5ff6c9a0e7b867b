# Everything runs in a virtual environment of its own; only python3 (3.11 or newer) and make are needed.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test check check-router check-rest faults lint bench clean

demo: $(VENV)/demo.installed
	$(BIN)/python -m tools.demo --out demo-out

test: $(VENV)/dev.installed
	$(BIN)/python -m pytest

# Linters, and all tests but those marked slow, within a minute: two processes of one thread each, for two cores.
check: export OMP_NUM_THREADS = 1
check: $(VENV)/dev.installed
	$(MAKE) --jobs 2 --keep-going lint check-router check-rest

check-router: $(VENV)/dev.installed
	$(BIN)/python -m pytest -q -m 'not slow' tests/router

check-rest: $(VENV)/dev.installed
	$(BIN)/python -m pytest -q -m 'not slow' --ignore tests/router

# 300 kills, 1,000 flipped bits, a soak of two minutes, 1,200 simulated losses of power and 42 on a real ext4 (where root may
# mount one and strace is there); takes about 35 minutes.
faults: $(VENV)/dev.installed
	rm -f docs/results/faults.log
	PEAR_CRAFTED=1 PEAR_KILLS=300 PEAR_FLIPS=1000 PEAR_SOAK_S=120 PEAR_POWER_LOSSES=1200 PEAR_POWER_CUTS=42 \
		PEAR_FAULT_LOG=$(CURDIR)/docs/results/faults.log $(BIN)/python -m pytest \
		-k 'kill_9 or flipped_bits_are_never_handed_out_are or soak or power or crafted' tests/pear_store
	PEAR_REMOTE_KILLS=100 PEAR_REMOTE_EXAMPLES=100 $(BIN)/python -m pytest tests/pear_store/remote
	PEAR_INTERRUPTS=1000000 PEAR_INTERRUPTED_CALLS=2000 PEAR_MANY_TASKS=20000 $(BIN)/python -m pytest \
		tests/router/test_interrupted.py tests/router/test_many_tasks.py

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
