# Every target works from a fresh clone: `.venv` is made and filled by the first one that needs it.
SHELL := /bin/bash
PYTHON ?= python3
LOCK ?= requirements-cpu.lock
BIN := .venv/bin
RUN := $(BIN)/python -m
ROOT := $(CURDIR)/runs
CPUS := --where.engine-threads 2
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo clean-demo test test-fast compat check format loop loop-baselines embed show-line show-captioning show-captioning-engine show-crashes show-plan show-teacher show-training show-serving package lock

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.venv/installed: $(LOCK) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(RUN) pip install --quiet uv==0.13.9
	# Bytecode now: else every process of every job may compile Ray, pandas and torch for itself.
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --no-deps --compile-bytecode -r $(LOCK)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --no-deps -e .
	touch $@

install: .venv/installed  ## make .venv and install the locked packages

demo: .venv/installed  ## caption the 1,000 easy-VQA test images with the captioner of this repository
	$(RUN) jobs.demo demo --where.root $(ROOT)/demo $(CPUS)

clean-demo:  ## delete the demo's results
	rm -rf runs/demo

test: .venv/installed  ## every test that fits into minutes
	$(RUN) pytest

.venv-compat/installed: tests/compat/requirements.txt | .venv/installed
	test -x .venv-compat/bin/python || $(PYTHON) -m venv .venv-compat
	VIRTUAL_ENV=$(CURDIR)/.venv-compat $(BIN)/uv pip sync --quiet --require-hashes tests/compat/requirements.txt
	touch $@

tests/compat/node_modules/installed: tests/compat/package-lock.json tests/compat/package.json
	@command -v npm >/dev/null || { echo "error: make compat needs Node 20 or newer, with npm"; exit 1; }
	npm --prefix tests/compat ci --ignore-scripts
	touch $@

test-fast: .venv/installed  ## the unit tests (below 4 minutes on 2 cores); ORDER=--random-order shuffles them
	$(RUN) pytest tests/unit $(ORDER)

compat: .venv/installed .venv-compat/installed tests/compat/node_modules/installed  ## public clients of OpenAI's API against a live server (about 2 minutes)
	$(RUN) pytest -m compat tests/compat

check: .venv/installed  ## static checks: format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

loop: .venv/installed  ## the whole system in miniature: teach, caption, train, evaluate (about 50 minutes)
	$(RUN) jobs.run_all easy-vqa --where.root $(ROOT)/easy-vqa $(CPUS)

embed:  ## make the captioner of the last loop the one that comes with this repository
	test -f runs/easy-vqa/captioner/v1/manifest.json
	rm -rf sg4v_ray/recipes/nano_captioner
	mkdir sg4v_ray/recipes/nano_captioner
	cp -r runs/easy-vqa/captioner/v1/model runs/easy-vqa/captioner/v1/manifest.json sg4v_ray/recipes/nano_captioner/

loop-baselines: .venv/installed  ## the same without good captions: one word each, or none
	$(RUN) jobs.run_all easy-vqa-one-word --where.root $(ROOT)/easy-vqa $(CPUS)
	$(RUN) jobs.run_all easy-vqa-no-pretraining --where.root $(ROOT)/easy-vqa $(CPUS)

show-line: .venv/installed  ## everything this repository claims and a script can show
	$(MAKE) check
	$(MAKE) clean-demo demo
	$(RUN) pytest -m 'not gpu and not shown and not scale and not compat and not crashes and not ((teacher or training or serving) and soak)'
	$(MAKE) loop
	$(RUN) pytest -m shown tests/shown/test_line.py

show-captioning: .venv/installed  ## what is claimed about captioning at scale (about 60 minutes)
	$(MAKE) check
	$(RUN) pytest -m scale
	$(RUN) jobs.bench_captions --case control-plane --rows 1200000 --root $(ROOT)/bench-rows
	$(RUN) jobs.bench_captions --case scaling --root $(ROOT)/bench-scaling
	$(RUN) pytest -m shown tests/shown/test_captioning.py -k 'not job_over'

show-crashes: .venv/installed  ## a job killed at storage requests of each kind is finished by one resume (at most 60 minutes)
	$(RUN) pytest -m crashes tests/crashes

show-plan: .venv/installed  ## a job over 20 million rows: memory, restarts, commit (at most 40 minutes)
	$(RUN) jobs.bench_plan --root $(ROOT)/bench-plan
	$(RUN) pytest -m shown tests/shown/test_plan.py

show-captioning-engine: .venv/installed  ## the same beside the bare engine and the published settings (about 50 minutes)
	$(RUN) jobs.bench_captions --case engine --images 200 --root $(ROOT)/bench-engine
	$(RUN) pytest -m shown tests/shown/test_captioning.py -k job_over

show-teacher: .venv/installed  ## what is claimed about teacher captions (about 35 minutes)
	$(MAKE) check
	$(RUN) pytest -m teacher

show-training: .venv/installed  ## what is claimed about training, weights and estimates
	$(MAKE) check
	$(RUN) pytest -m 'training and not gpu'
	$(RUN) jobs.bench_training --root $(ROOT)/bench-training
	$(RUN) pytest -m shown tests/shown/test_training.py

show-serving: .venv/installed  ## what is claimed about the server
	$(MAKE) check
	$(RUN) pytest -m serving
	$(MAKE) compat
	$(RUN) jobs.bench_serving --root $(ROOT)/bench-serving
	$(RUN) pytest -m shown tests/shown/test_serving.py

CONFIG := serve/config.easy-vqa.yaml
package: .venv/installed  ## pack the server for `serve deploy`: make package CONFIG=... ROOT=/shared/runs
	$(RUN) serve.package config=$(CONFIG) root=$(ROOT) to=dist

lock: .venv/installed  ## resolve the lock files anew
	$(BIN)/uv pip compile requirements-cpu.in --override requirements-cpu.overrides --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url --no-emit-find-links -o requirements-cpu.lock
	$(BIN)/uv pip compile requirements-gpu.in --override requirements-gpu.overrides --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url --no-emit-find-links -o requirements-gpu.lock
	$(BIN)/uv pip compile tests/compat/requirements.in --generate-hashes --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url --no-emit-find-links -o tests/compat/requirements.txt
	npm --prefix tests/compat install --package-lock-only --ignore-scripts
