# Every target sets up what it needs: Python 3.11+, pip, a C++ compiler and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEER := build/bench/peer/bin
LLAMA := 0.3.36
# Processes at once, where compiling takes the time.
JOBS ?= $(shell nproc)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CMAKE := $(or $(shell command -v cmake),$(BIN)/cmake)
BUILD = $(CMAKE) --build build/$@ --parallel 2

.PHONY: demo test gpu gpu-sanitize triton-gate campaign mutants check wheel wheel-test sanitize amx arm64 bench bench-peer clean

demo: $(VENV)/.run
	$(BIN)/truekv demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# For a machine with a GPU: the kernels on the device, and how fast they are (bench/RESULTS-gpu.md). Most of the tests'
# time goes into compiling, hence the processes; what they compiled stays in build/triton. QUICK=--quick: minutes less.
# The speeds are measured whatever the tests say, and a warning of the device's libraries fails none of them.
# READY=python3: without a network, a Python that has torch for CUDA, pytest, pytest-xdist, hypothesis, safetensors,
# tokenizers, jinja2, typer and rich, and cmake; the native library, which answers are compared with, is built in place.
GPU_PYTHON = $(or $(READY),$(BIN)/python)
NATIVE := src/truekv/kernels/native/libtruekv_native.so
gpu gpu-sanitize: export TRITON_INTERPRET := 0
gpu gpu-sanitize: export TRITON_CACHE_DIR := $(CURDIR)/build/triton
gpu gpu-sanitize: export PYTHONPATH := $(CURDIR)/src
gpu: $(if $(READY),$(NATIVE),$(VENV)/.test)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(GPU_PYTHON) -m pytest -m gpu -n $(JOBS) \
	  -W default -p no:benchmark --durations=10 tests/gpu; tests=$$?; \
	$(GPU_PYTHON) -m bench.gpu $(QUICK) && exit $$tests

# The kernels alone under compute-sanitizer, stopped by the first address outside of what was allocated. Torch's pool of
# memory, within which any address is good, is off. After make gpu, so that nothing compiles under it.
gpu-sanitize: $(if $(READY),,$(VENV)/.test)
	OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all \
	  --error-exitcode 9 $(GPU_PYTHON) -m pytest -m gpu -x -q -W default -p no:benchmark \
	  $(addprefix tests/gpu/test_,ops.py frames.py attention.py cuda.py scans.py)

$(NATIVE): $(wildcard native/*.cpp native/*.h native/CMakeLists.txt)
	$(CMAKE) -S native -B build/native -DCMAKE_BUILD_TYPE=Release
	$(CMAKE) --build build/native --parallel $(JOBS)
	cp build/native/$(@F) $@

# Every Triton kernel compiled for two GPUs and compared with a table, or with WRITE=--write taken into it: minutes.
triton-gate: $(VENV)/.test
	$(BIN)/python tools/triton_gate.py $(WRITE)

# A hundred thousand examples where make test draws two thousand, and the full products: twenty minutes.
campaign: $(VENV)/.test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --hypothesis-profile=campaign tests/memory/test_reuse.py
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --campaign -m campaign

# Bugs that other engines have shipped, put into the code one by one, and the test that notices each.
mutants: $(VENV)/.test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TRITON_INTERPRET=1 PYTHONPATH=tests $(BIN)/python -m mutants

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# For a machine with nothing else to do. Checkpoints, the peer and the last measurements stay in build/bench.
bench: $(VENV)/.bench bench-peer
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.ops
	$(BIN)/python -m bench.decode --peer llama.cpp
	$(BIN)/python -m bench.decode --peer transformers
	$(BIN)/python -m bench.serve_engine
	$(BIN)/python -m bench.report

# llama.cpp for this machine's processor, from the sources of llama-cpp-python, whose converter stays beside it. The
# package's own build would make all of llama.cpp's programs' code too; the bench needs libllama alone.
bench-peer: build/bench/peer/ready

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e ".[test,check]"
	touch $@ $(VENV)/.run

$(VENV)/.check: $(VENV)/.test
	touch $@

# Nearly all of it are the embedded models; the sizes are printed.
wheel: $(VENV)/bin/python
	rm -rf dist
	$(BIN)/pip wheel -q --no-deps -w dist .
	$(BIN)/python tools/wheel.py dist/*.whl

# Installed into an environment of its own. Then built again without a compiler.
wheel-test: wheel $(VENV)/.run
	$(BIN)/python tools/wheel.py dist/*.whl native
	rm -rf build/pure
	CXX=/bin/false $(BIN)/pip wheel -q --no-deps -w build/pure .
	$(BIN)/python tools/wheel.py build/pure/*.whl reference

# The tests of the native kernels, stopped by the first wrong address or undefined behaviour.
sanitize: $(VENV)/.test $(CMAKE)
	$(CMAKE) -S native -B build/$@ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSANITIZE=ON
	$(BUILD)
	LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
	$(BIN)/python tools/other_library.py build/$@ -x -q --capture=sys -p no:cacheprovider tests/kernels/native \
	  --deselect tests/kernels/native/test_library.py::test_it_is_small

# The kernels for AMX with its tiles emulated, for a machine that has AVX-512 with bf16 and no AMX: what they compute.
amx: $(VENV)/.test $(CMAKE)
	$(CMAKE) -S native -B build/$@ -DTILES=emulated
	$(BUILD)
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python tools/other_library.py build/$@ -q -k amx tests/kernels/native
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python tools/other_library.py build/$@ -q \
	  tests/models/test_exact.py tests/serve/test_doctor.py

# The kernels for 64-bit Arm, cross-compiled and compared with double arithmetic under an emulator: with the packages
# g++-aarch64-linux-gnu and qemu-user where both are installed, else with a compiler and an emulator from PyPI.
ARM64 := build/arm64-tools
CROSS := $(and $(shell command -v aarch64-linux-gnu-g++),$(shell command -v qemu-aarch64))
arm64: $(CMAKE) $(if $(CROSS),,$(ARM64)/ready)
	$(CMAKE) -S native -B build/$@ -DCHECKS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 $(if $(CROSS), \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu", \
	  "-DCMAKE_CXX_COMPILER=$(abspath $(ARM64))/c++" -DCMAKE_EXE_LINKER_FLAGS=-static \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=$(abspath $(ARM64))/bin/python;$(abspath tools/arm64.py)")
	$(BUILD)
	CTEST_OUTPUT_ON_FAILURE=1 $(BUILD) --target test

$(ARM64)/ready:
	$(PYTHON) -m venv $(ARM64)
	$(ARM64)/bin/pip install -q ziglang unicorn
	printf '#!/bin/sh\nexec %s -m ziglang c++ -target aarch64-linux-musl "$$@"\n' $(abspath $(ARM64))/bin/python > $(ARM64)/c++
	chmod +x $(ARM64)/c++
	touch $@

$(BIN)/cmake: $(VENV)/bin/python
	$(BIN)/pip install -q cmake

$(VENV)/.bench: $(VENV)/.run
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	touch $@

build/bench/peer/ready:
	$(PYTHON) -m venv build/bench/peer
	$(PEER)/pip install -q cmake
	$(PEER)/pip download -q --no-deps --no-binary llama-cpp-python -d build/bench llama-cpp-python==$(LLAMA)
	rm -rf build/bench/llama.cpp && mkdir -p build/bench/llama.cpp
	tar xzf build/bench/llama_cpp_python-$(LLAMA).tar.gz -C build/bench/llama.cpp --strip-components 1
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(PEER)/pip install -q build/bench/llama.cpp
	$(PEER)/cmake -S build/bench/llama.cpp/vendor/llama.cpp -B build/bench/peer/llama -DCMAKE_BUILD_TYPE=Release \
	    -DGGML_NATIVE=ON
	$(PEER)/cmake --build build/bench/peer/llama --target llama --parallel $(JOBS)
	library=$$($(PEER)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/llama_cpp/lib && \
	    mkdir -p $$library && cp -a build/bench/peer/llama/bin/*.so* $$library/
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
