# Everything runs in .venv; `make install` is a dependency of the rest and does nothing when up to date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := data/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test check faults bench bench-deps clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## make .venv with everything the demo, the tests and the benchmarks need

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "latentpress needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[pipeline,train,bench,dev,s3,slurm,zarr]'
	@touch $@

demo: install  ## from clips to a trained step: about 5 minutes on 2 cores
	$(BIN)/latentpress demo $(DEMO)
	$(BIN)/latentpress validate $(DEMO)/manifest.jsonl -c configs/preprocess/demo.toml
	$(BIN)/latentpress plan configs/preprocess/demo.toml
	$(BIN)/latentpress preprocess configs/preprocess/demo.toml
	$(BIN)/latentpress verify $(DEMO)/latents
	$(BIN)/latentpress inspect $(DEMO)/latents -o $(DEMO)/inspect.png
	$(BIN)/latentpress report $(DEMO)/latents
	$(BIN)/latentpress train configs/train/demo.toml
	$(BIN)/latentpress report runs/demo
	@echo
	@echo "Look at:"
	@echo "  $(DEMO)/inspect.png            source frames over decoded latents"
	@echo "  $(DEMO)/latents/report.html    the dataset: samples, histograms, quarantine, throughput"
	@echo "  $(DEMO)/latents/summary.json   what preprocessing did, and its slowest stage"
	@echo "  runs/demo/report.html            the training run; metrics.jsonl and the checkpoints are beside it"

test: install  ## all tests that this machine can run (no network; GPU tests are skipped without one)
	$(BIN)/python -m pytest

check: install  ## formatting, lint, import contracts, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

faults: install  ## every fault of tests/faults, at every call and at random times: about 25 minutes on 2 cores
	$(BIN)/python -m tests.faults.campaign

bench: install  ## decode benchmark over CLIPS (default: the demo's clips)
	$(BIN)/latentpress bench decode $(or $(CLIPS),$(DEMO)/clips)

bench-deps:  ## the system libraries torchcodec needs (Debian, Ubuntu; as root)
	apt-get update && apt-get install -y --no-install-recommends ffmpeg

clean:  ## remove .venv, caches, data/ and runs/
	rm -rf .venv data runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
