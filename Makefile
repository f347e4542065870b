# `make demo` and `make test` do all the set-up themselves, in a virtual environment of their own.
# test-gpu, test-node, sanitize and bench need CUDA, CuPy and for test-node DeepEP: they run with PYTHON.
PYTHON ?= python3
# Pinned here and not in pyproject.toml: users have their torch. TORCH=torch takes what pip finds. Where
# the wheel index serves CUDA builds, add its CPU address to pip (PIP_INDEX_URL) to save gigabytes.
TORCH ?= torch==2.13.0
# Tests of clients run in the framework itself, pinned. It asks for much that only its trainer needs.
TORCHTITAN := torchtitan==0.3.0; python_version >= '3.11'
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test lint test-cpu test-drop-ins test-clients test-others test-long test-gpu test-node sanitize faults bench docs abi clean

demo: $(VENV)/installed
	$(BIN)/lplb-ep demo

# What CI runs. The parts run two at a time, the longest first, and each prints when it ends.
test: $(VENV)/installed
	$(MAKE) --jobs=2 --output-sync=target test-cpu test-others test-clients test-drop-ins lint

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test-cpu: $(VENV)/installed
	$(BIN)/python -m pytest tests/cpu --ignore=tests/cpu/clients --ignore=tests/cpu/deepep

# DeepEP's classes and what takes their place, on recording and embedded buffers.
test-drop-ins: $(VENV)/installed
	$(BIN)/python -m pytest tests/cpu/deepep

# Megatron-Core and torchtitan themselves, over embedded buffers.
test-clients: $(VENV)/installed
	$(BIN)/python -m pytest tests/cpu/clients

# The emulated kernels, and whatever the hardware here allows.
test-others: $(VENV)/installed
	$(BIN)/python -m pytest tests --ignore=tests/cpu

# Further sizes, and every variant of every kernel: before an issue is resolved.
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m long

test-gpu:
	LPLB_TEST_REQUIRE_GPU=1 $(PYTHON) -m pytest tests/gpu

test-node:
	LPLB_TEST_REQUIRE_GPU=1 $(PYTHON) -m pytest tests/node

sanitize:
	$(PYTHON) tests/sanitize.py

# Faults planted in copies of the kernels: which of them the emulator's tests find.
faults: $(VENV)/installed
	$(BIN)/python tests/emulator/faults.py

bench:
	$(PYTHON) -m lplb_ep.tools.cli bench

# The tables of modules (docs/architecture.md) and of settings (docs/settings.md).
docs:
	$(PYTHON) tests/written.py

# The kernels' side of what is declared in structs.py of planning/ and weights/; a test compares them.
abi: $(VENV)/installed
	$(BIN)/python -m lplb_ep.planning.structs
	$(BIN)/python -m lplb_ep.weights.structs

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable '.[dev,megatron,torchtitan]'
	# It asks for Python 3.12, and has a wheel for 3.11 that runs.
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || exit 0; $(PIP) --no-deps \
		--ignore-requires-python "$$(grep -o 'megatron-core==[0-9.]*' pyproject.toml)"
	$(PIP) --no-deps "$(TORCHTITAN)"
	touch $@

clean:
	rm -rf $(VENV) out build dist
