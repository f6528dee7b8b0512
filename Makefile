# Every target sets up what it needs: Python 3.11+, pip, a C++ compiler and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEER := build/bench/peer/bin
LLAMA := 0.3.36
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check bench bench-peer clean

demo: $(VENV)/.run
	$(BIN)/truekv demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# For a machine with nothing else to do. Checkpoints, the peer and the last measurements stay in build/bench.
bench: $(VENV)/.bench bench-peer
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.decode --peer llama.cpp
	$(BIN)/python -m bench.decode --peer transformers
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
	$(PEER)/cmake --build build/bench/peer/llama --target llama --parallel $(shell nproc)
	library=$$($(PEER)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/llama_cpp/lib && \
	    mkdir -p $$library && cp -a build/bench/peer/llama/bin/*.so* $$library/
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
