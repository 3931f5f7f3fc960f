# make train   run the main job on the embedded set           make lint   ruff, the pinned version
# make test    run every test                                 make bench  the table of speeds against plain PyTorch
# Each creates .venv and installs what it needs when that is missing.

PYTHON ?= python3
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: train test lint bench

# .venv/train: a stamp that this set of extras is installed as pyproject.toml and the C++ sources now stand.
.venv/%: $(SOURCES)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[$*]'
	@touch $@

train: .venv/train
	.venv/bin/python training/train.py

test: .venv/test
	.venv/bin/python -m pytest

lint: .venv/lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/bench
	.venv/bin/python -m benchmarks
