# make demo | make test | make test-hf: each sets up a virtual environment first; the second run finds the stamp and is quick.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PYTHON ?= python3
# Plain `pip install torch` pulls gigabytes of CUDA libraries; without a GPU the constraint file pins a CPU build.
CONSTRAINT := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")

.PHONY: demo test test-hf lint teacher

$(STAMP): pyproject.toml constraints-cpu.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/hf-rad demo

test: $(STAMP)
	$(BIN)/python -m pytest

# Transformers' own model tests, of the installed version, on students. Downloads its source distribution once.
test-hf: $(STAMP)
	$(BIN)/python -m pytest -o addopts=-q -W ignore tests/hf_model_tests/suite.py

lint: $(STAMP)
	$(BIN)/ruff check .

teacher: $(STAMP)
	$(BIN)/python -m examples.smollm2.fetch
