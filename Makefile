# Each target is one line and is what CI and the README run. Uses the active virtual environment, else ./.venv, which `setup`
# makes; a machine with a card may have no such environment, so what runs there takes python3 in its place.
PYTHON := $(or $(VIRTUAL_ENV),.venv)/bin/python
CARD_PYTHON := $(or $(wildcard $(PYTHON)),python3)

.PHONY: setup test test-full test-gpu lint types bench bench-gpu gpu-budgets format

setup: ; @bash start_server.sh --install test
test: setup lint types ; $(PYTHON) tests/lanes.py -m "not slow"
test-full: setup lint types ; $(PYTHON) -m pytest
test-gpu: ; $(CARD_PYTHON) -m pytest tests/gpu tests/kernels_gpu -m "not slow" -v --durations=10
bench-gpu: ; $(CARD_PYTHON) benchmarks/gpu/bench.py --json benchmarks/results/gpu.json
gpu-budgets: ; cd tests && PYTHONPATH=.:../serving $(abspath $(PYTHON)) -m kernels_gpu.compiled --write
lint: ; $(PYTHON) -m ruff check .
types: ; $(PYTHON) -m mypy -p octavo.protocol -p octavo.scheduling -p octavo_client
bench: ; $(PYTHON) benchmarks/run_all.py
format: ; $(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .
