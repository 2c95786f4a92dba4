# Each target first makes .venv with everything in it (once; again when setup.py
# or constraints.txt change), so a fresh clone needs no other step.

PYTHON ?= python3
DEMO_OUT ?= demo_output
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-baseline test-torch matrix bench gpu core sanitize wheel docs lint fuzz clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## register a synthetic chest and write the results to demo_output
	$(BIN)/python -m evaluation.demo --out $(DEMO_OUT)

test: $(INSTALLED) ## run the tests that need neither a GPU nor minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Those whose numbers round differently on an older processor.
NUMERICAL := $(patsubst %,tests/%,space fields maps losses report/test_metrics.py \
	fit/test_affine.py fit/test_optimize.py icon/test_models.py)
test-baseline: $(INSTALLED) ## run the numerical tests as on the oldest processor
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -n auto \
		$(NUMERICAL)

test-torch: $(INSTALLED) ## run the numerical tests without the compiled core
	OMP_NUM_THREADS=1 NEPHI_CORE=torch $(BIN)/python -m pytest -n auto $(NUMERICAL)

ONLY ?=
matrix: $(INSTALLED) ## run the tests as on other processors and with other versions
	.ci/matrix $(ONLY)

bench: $(INSTALLED) ## measure the speed and memory of the core
	$(BIN)/python -m evaluation.speed.bench_field
	$(BIN)/python -m evaluation.speed.bench_regularizer --counts 500 5000
	$(BIN)/python -m evaluation.speed.bench_step
	$(BIN)/python -m evaluation.speed.bench_export
	$(BIN)/python -m evaluation.speed.bench_scaling
	$(BIN)/python -m evaluation.speed.bench_core

GPU_OUT ?= gpu_output
gpu: $(INSTALLED) ## test and measure on a CUDA device, eight minutes at most
	$(BIN)/python -m evaluation.speed.gpu --out $(GPU_OUT)

core: $(INSTALLED) ## build the compiled core again, after a change of its sources
	$(BIN)/python setup.py build_ext --inplace --force

sanitize: $(INSTALLED) ## run the core's tests under the address and undefined sanitizers
	PYTHON=$(BIN)/python .ci/sanitize

wheel: $(INSTALLED) ## build a wheel with the compiled core and one without, into dist
	PYTHON=$(BIN)/python .ci/wheel

docs: $(INSTALLED) ## build the documentation, docs/_build/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

lint: $(INSTALLED) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict icon_nephi

SECONDS ?= 600
fuzz: $(INSTALLED) ## give damaged and hostile files to every reader for ten minutes
	OMP_NUM_THREADS=1 .ci/fuzz --seconds $(SECONDS)

clean: ## delete what the other targets wrote, except .venv and evaluation results
	rm -rf $(DEMO_OUT) $(GPU_OUT) build dist *.egg-info .hypothesis .pytest_cache .ruff_cache .mypy_cache
	find icon_nephi evaluation training tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(INSTALLED): setup.py constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@
