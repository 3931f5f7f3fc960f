# make train   run the main job on the embedded set           make lint   ruff and clang-format, the pinned versions
# make test    run the tests                                  make bench  the table of speeds against plain PyTorch
# make test-slow   those that take minutes and rarely break: the Triton kernels compiled for GPUs that are not here
# make gate    fail where the kernels have lost their lead over plain PyTorch, in a few seconds
# make versions  the operators' tests with the oldest and the newest torch; PYTHON="python3.11 python3.14" names several
# make sanitize    random calls of every operator under the address, undefined and thread sanitizers; CASES=10000
# make mutants     which single changes of the code no fast test notices (long); ONLY="training.report.metrics*"
# make docs    the site in build/docs/site, warnings are errors
# make wheel   source distribution and wheel in dist, installed where nothing else is and asked what they are
# make gpu     on a machine with a CUDA device: tests, compute-sanitizer and benchmarks there, without a network
# Each but the last two creates .venv and installs what it needs when that is missing; gpu uses PYTHON as it is.

PYTHON ?= python3
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
OLDEST_TRITON := $(if $(filter Linux,$(shell uname)),.venv/triton-3.6)

.PHONY: train test test-slow lint bench gate versions sanitize mutants docs wheel gpu

# .venv/train: a stamp that this set of extras is installed as pyproject.toml and the C++ sources now stand.
.venv/%: $(SOURCES)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[$*]'
	@touch $@

# The oldest Triton that the kernels must compile with, beside the one that torch brings.
.venv/triton-3.6: | .venv/test
	rm -rf $@.part
	.venv/bin/python -m pip install --quiet --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

train: .venv/train
	.venv/bin/python training/train.py

test: .venv/test
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: .venv/test $(OLDEST_TRITON)
	.venv/bin/python -m pytest -n auto --dist worksteal -m "slow and not nightly"

lint: .venv/lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run --Werror csrc/*

bench: .venv/bench
	.venv/bin/python -m benchmarks

gate: .venv/bench
	.venv/bin/python -m benchmarks --gate

versions:
	.ci/versions $(PYTHON)

sanitize: .venv/test
	.ci/sanitize

mutants: .venv/test .venv/mutation
	.venv/bin/python -m mutmut run $(ONLY)
	.venv/bin/python -m mutmut results

docs: .venv/docs
	.venv/bin/python docs/build.py

wheel: .venv/wheel
	.ci/wheel .venv/bin/python

gpu:
	PYTHON='$(PYTHON)' .ci/gpu
