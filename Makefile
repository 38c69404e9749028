# make demo   trains and samples a diffusion model on this machine (about two minutes on two cores, after a set-up of three)
# make test   builds everything and runs the tests
# Both set up their own virtual environment in .venv, once.

PYTHON ?= python3
VENV ?= .venv
# Torch for the environment. A machine with a GPU wants a CUDA build: make TORCH=torch ...
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= -n 2
# One in so many variants of each test where the tests are run again on other back ends (interpreter, sanitizers, older
# instruction sets), and of the Triton kernels compiled ahead of time. 1: all. The sample is always the same one.
SAMPLE ?= 1
# The same for the first run on the emulated GPU.
SAMPLE_SIM ?= 1
# Installed without what they depend on, which would replace torch, and beside the environment: see tests/peers.py.
PEERS := torchvision==0.28.0 timm==1.0.31

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

NVCC ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc) /usr/local/cuda/bin/nvcc)

.PHONY: demo test test-isa test-sanitized primitives-check lint format bench packaging wheel aot gpu gpu-carry build clean
# Without a GPU the CUDA kernels would only cost the demo build time.
demo: $(STAMP)
	@$(if $(wildcard /dev/nvidia0),,PYNN_CUDA_ARCHS=) $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/pynn train ddpm --out runs/demo --overwrite --threads auto

# The CPU kernels and the CUDA C++ ones (on the CPU, through csrc/sim); then the Triton ones in Triton's interpreter, which
# has to be chosen when a process starts. With a GPU the first run takes its kernels along.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -k "not [sim"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --every $(SAMPLE_SIM) -k "[sim"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --every $(SAMPLE) -k "[interpret"

# The same kernels for older CPUs: the op tests again on the other instruction sets. The baseline has no fused
# multiply-add, so each product is rounded: it is not held to the error of torch's kernels, which use one here (the bounds
# per element and the exact tests hold as they are).
ISA_TESTS := tests/test_additive_attention.py tests/test_conv2d.py tests/test_conv2d_depthwise.py \
	tests/test_conv2d_prologue.py tests/test_group_norm_conv2d.py tests/test_recurrent_accuracy.py \
	tests/test_conv2d_narrow.py tests/test_conv2d_winograd.py tests/test_conv_transpose2d.py \
	tests/test_diffusion.py tests/test_group_norm.py tests/test_random.py \
	tests/test_scaled_dot_product_attention.py tests/test_scaled_dot_product_attention_decode.py \
	tests/test_scaled_dot_product_attention_nonfinite.py tests/test_scaled_dot_product_attention_options.py \
	tests/test_attention_weights.py tests/test_multi_head_attention.py \
	tests/test_rotary_embedding.py tests/test_recurrent.py \
	tests/test_layer_norm_lstm.py tests/test_tree_lstm.py
test-isa: build
	PYNN_CPU_ISA=avx2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -q --every $(SAMPLE) -k "not [sim" \
	  $(ISA_TESTS)
	PYNN_CPU_ISA=baseline OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -q --every $(SAMPLE) \
	  -k "not [sim and not accuracy" $(ISA_TESTS)

# The CUDA sources on the CPU under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and gcov.
test-sanitized: build
	$(BIN)/python tests/sanitized.py --every $(SAMPLE)

# The program that compares every PTX wrapper with its twin on a GPU: build/primitives_check. Exit status 77 without one.
PRIMITIVES := csrc/sim/selftest/primitives_check.cu csrc/sim/selftest/kernels.cuh csrc/sim/twins.h csrc/include/dtype.h \
	csrc/cuda/primitives.cuh csrc/cuda/launch.h
primitives-check: build/primitives_check
build/primitives_check: $(PRIMITIVES)
	@mkdir -p build
	$(NVCC) -std=c++20 -O3 --fmad=false -Werror all-warnings --expt-relaxed-constexpr -Icsrc/include \
	  -gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90a,code=sm_90a $< -o $@

# The wheels for a release, into dist/: without CUDA kernels, and with them for CUDA 13 (docs/wheels.md).
wheel: $(STAMP)
	rm -f dist/*.whl
	PYNN_WHEEL_VARIANT=cpu PYNN_CUDA_ARCHS= $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .
	@if test -x "$(NVCC)"; then \
	  PYNN_WHEEL_VARIANT=cu13 $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .; \
	else echo "no nvcc: the cu13 wheel is left out"; fi
	@ls -l dist/*.whl

# Looks into those wheels and installs them into a fresh environment; then `pip install .` with build isolation.
packaging: wheel
	$(BIN)/python tests/packaging_check.py

# Every GPU kernel compiled for every target on this machine without a GPU; registers, spills, vector widths and what may be
# fused against tests/aot/ratchet.json. ACCEPT=1 writes new values there, for review.
aot: build
	PYTHONPATH=.:tests $(BIN)/python -m aot --every $(SAMPLE) $(if $(ACCEPT),--accept)

# A short benchmark run: fails on wrong results, never on time.
bench: build
	$(BIN)/python -m bench --quick

# Everything that needs a GPU, in less than eight minutes: checks, tests, compute-sanitizer, benchmarks. Installs nothing:
# GPU_PYTHON has a CUDA build of torch, Triton, pytest, pytest-xdist and hypothesis, and pytest-timeout if kernels may
# hang. Results go to bench/results, or OUT.
GPU_PYTHON ?= python3
gpu:
	PYTHONPATH=.:tests $(GPU_PYTHON) -m gpu_check $(if $(OUT),--out $(OUT))

# Builds here what a GPU machine without a compiler or a package index needs, and prints what to take along.
gpu-carry: build primitives-check
	PYTHONPATH=.:tests $(BIN)/python -m gpu_check.carry

CXX_SOURCES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

build: $(STAMP)
	@$(BIN)/python setup.py -q build_ext --inplace

$(STAMP): pyproject.toml
	@command -v g++ >/dev/null || { echo "pynn needs a C++ compiler: apt-get install g++"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ echo "no virtual environment could be made: apt-get install python3-venv python3-dev"; exit 1; }
	$(BIN)/pip install -q --upgrade "setuptools>=77" wheel ninja pybind11
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	PYNN_CUDA_ARCHS= $(BIN)/pip install -q --no-build-isolation -e ".[train,bench,dev,peers]"  # CUDA kernels: make build
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/peers $(PEERS)
	@touch $@

clean:
	rm -rf build dist *.egg-info pynn/lib pynn/_core*.so
