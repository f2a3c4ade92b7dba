# The commands of this repository. A bare `make` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Without a home pip would make its cache in a folder called "~".
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q $(if $(HOME),,--no-cache-dir)
OUT    ?= out
COMMIT ?= HEAD~1
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-nightly mutants fuzz soak interleavings check fmt bench bench-before bench-large bench-tiny bench-serve check-serve precision train plugins gpu-engines test-gpu bench-gpu clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-17s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "making $(VENV) and installing (about 2 GB of wheels the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## build an engine from the trained demo model and ask it about two pictures
	@$(BIN)/python scripts/demo.py $(OUT)/demo

test: $(STAMP) ## run the tests (all cores)
	@$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-nightly: $(STAMP) ## what `make test` takes a part of: every kernel, binary, plan, more examples; other clients, a browser, Ray (hours)
	@$(PIP) install -c constraints.txt -e '.[nightly]'
	@test -d $(OUT)/clients || $(PYTHON) -m venv $(OUT)/clients
	@$(OUT)/clients/bin/python -m pip --disable-pip-version-check -q install 'langchain-openai>=0.3' 'litellm>=1.70'
	@$(BIN)/python -m pytest -q -n auto --dist loadgroup -m nightly
	@$(BIN)/python -m pytest -q -n auto --dist loadfile --hypothesis-profile thorough

mutants: $(STAMP) ## plant known faults, one after the other: does the suite notice each? (minutes)
	@$(BIN)/python scripts/mutants.py

fuzz: $(STAMP) ## 10,000 fuzzed requests at a memory ceiling: no crash, hang, untyped error, lost memory (minutes)
	@PYTHONMALLOC=malloc $(BIN)/python scripts/fuzz.py

soak: $(STAMP) ## 30 minutes at full load: is memory flat, and does every request end?
	@$(BIN)/python scripts/soak.py

interleavings: $(STAMP) ## histories of requests on every golden family: is each answer the one alone? (minutes)
	@$(BIN)/python scripts/interleavings.py

check: $(STAMP) ## ruff, ruff format, mypy --strict and the import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --config-file bench/mypy.ini
	@$(BIN)/lint-imports

fmt: $(STAMP) ## format and mend what ruff can
	@$(BIN)/ruff check --fix -q .
	@$(BIN)/ruff format -q .

bench: $(STAMP) ## against transformers, on 60 M and 1 B parameters; what batching and the cache are worth
	@$(BIN)/python bench/compare.py --sizes 60m 1b --work $(OUT)/bench
	@$(BIN)/python bench/serving.py --engine $(OUT)/bench/1b.engine --picture $(OUT)/bench/steps.png

bench-serve: $(STAMP) ## the HTTP server: seconds that clients wait at three loads, and what HTTP costs beside pipe()
	@$(BIN)/python bench/serve.py $(OUT)/demo/engine --picture bench/serve.png
	@$(BIN)/python bench/serve_overhead.py $(OUT)/demo/engine

check-serve: $(STAMP) ## the HTTP server under load, SIGTERM and attack: right answers, nothing leaked, memory flat (minutes)
	@$(BIN)/python bench/serve_check.py $(OUT)/demo/engine
	@$(BIN)/python bench/serve_hostile.py $(OUT)/demo/engine

bench-before: $(STAMP) ## is anything slower than at COMMIT? side by side (1 B: after make bench)
	@$(BIN)/python bench/before.py $(COMMIT) --work $(OUT)/bench \
	  --checkpoints recipes/vlmforge_recipes/llava/demo/checkpoint $(OUT)/bench/1b.checkpoint

bench-large: $(STAMP) ## build a 7 B checkpoint (random, 14 GB) and print seconds and peak memory
	@$(BIN)/python bench/build_memory.py --size 7b --work $(OUT)/bench

bench-tiny: $(STAMP) ## build every golden checkpoint and print seconds and peak memory
	@$(BIN)/python bench/build_memory.py --checkpoint tests/data/*/checkpoint --dtype float32 --work $(OUT)/bench

precision: $(STAMP) ## accuracy of the demo model in each precision
	@$(BIN)/python scripts/precision.py $(OUT)/precision

train: $(STAMP) ## train the demo model again, into out/train (40 minutes on 2 cores)
	@$(BIN)/python -m vlmforge_recipes.llava.demo.train -o $(OUT)/train

plugins: $(STAMP) ## compile the attention kernels for every GPU with nvcc (engines use NVRTC instead)
	@$(BIN)/python -m vlmforge_plugins.cached_attention.compile --compiler nvcc --out $(OUT)/plugins

gpu-engines: $(STAMP) ## engines of every kind for `make test-gpu`, built where there is no GPU
	@$(BIN)/python bench/gpu_engines.py build $(OUT)/gpu_engines

test-gpu: ## on a GPU: kernels, CUDA graphs, compute-sanitizer; whole engines (after make gpu-engines)
	@$(PYTHON) bench/gpu_suite.py test engines --out $(OUT)/gpu --engines $(OUT)/gpu_engines

bench-gpu: ## on a GPU: kernels against its own ceilings and torch's SDPA, a 7 B engine; then BENCH.md
	@$(PYTHON) bench/gpu_suite.py bench speed --out $(OUT)/gpu --engines $(OUT)/gpu_engines
	@$(PYTHON) bench/gpu_report.py $(OUT)/gpu/results.json

clean: ## remove what the commands above made
	rm -rf $(OUT) $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
