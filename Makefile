# Every target works from a clean clone with python3, make and a C++20 compiler. Packages go into .venv;
# an installation is repeated only when what it is made from has changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# A build of torch for a GPU brings the Triton that it was built with; beside one for the processor it is ours to choose.
TRITON := $(if $(shell command -v nvidia-smi rocm-smi),,--constraint tests/constraints-triton.txt)
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt $(TRITON)

# With a compiler at hand a failed build of the C++ module is an error, without one eager PyTorch serves.
COMPILER := $(shell command -v c++ || command -v g++ || command -v clang++)
CONTRASTILE_BUILD ?= $(if $(COMPILER),required,auto)
# Without a GPU the CUDA kernels are not compiled, which takes minutes: the tests run them on the processor.
CONTRASTILE_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)

PACKAGE_PARTS := pyproject.toml setup.py CMakeLists.txt tests/constraints.txt tests/constraints-triton.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

# A file stays in one process, as its tests share what they build. Files in their order: by default those with the
# fewest tests, which are the longest ones, would come last.
IN_PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := targets
.DELETE_ON_ERROR:
.PHONY: targets install demo test check bench must-reach kernels-full interpreter-full cuda-host-full gpu-check clean build/typed

targets:  # this list
	@awk -F ':.*  # ' '/^[a-z-]+:.*  # / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.package  # the package, editable, and PyTorch into .venv
	@$(RUN) -m contrastile doctor

demo: $(VENV)/.demo  # train on about 3,950 emoji and their names; table on screen, pictures in out/
	$(RUN) -m contrastile demo

test: $(VENV)/.test $(VENV)/.rivals  # the whole suite, in a process for each core
	$(RUN) -m pytest $(IN_PARALLEL)

check: $(VENV)/.dev build/typed  # ruff, mypy and the fast tests, in a minute or two
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(RUN) -m pytest --quiet -m "not slow" $(IN_PARALLEL)

bench: $(VENV)/.bench $(VENV)/.rivals  # time, memory and error of every implementation against N
	$(RUN) -m contrastile bench --out out/bench.json --plot out/bench.png

must-reach: $(VENV)/.bench  # the performance promises, measured and judged
	$(RUN) -m contrastile bench --must-reach --out out/must-reach.json

kernels-full: $(VENV)/.test  # compile every kernel configuration for every GPU, check it, compare its bound
	$(RUN) -m contrastile doctor --kernels all

interpreter-full: $(VENV)/.test  # run the Triton kernels in Triton's interpreter, at length
	CONTRASTILE_KERNELS=full $(RUN) -m pytest --durations=10 --numprocesses auto --dist load tests/test_triton_interpreter.py

cuda-host-full: $(VENV)/.test  # run the CUDA kernels on the processor: plain, under sanitizers, with a race check, at length
	CUDA_HOST_FULL=1 $(RUN) -m pytest --durations=20 tests/test_cuda_driver.py tests/test_cuda_kernels.py \
	    tests/test_cuda_host.py tests/cuda_host

gpu-check: $(VENV)/.test $(VENV)/.gpu-rivals  # suite, sanitizer and benchmark on a GPU, into bench/results/; says what is missing
	$(RUN) tests/gpu_check.py

clean:  # remove what the other targets made, .venv and out/ included
	rm -rf $(VENV) build dist out *.egg-info python/contrastile/_C.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find bench kernels python tests -name __pycache__ -type d -exec rm -rf {} +

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(PACKAGE_PARTS) | $(RUN)
	@echo "installing contrastile and PyTorch into $(VENV)"
	@CONTRASTILE_BUILD=$(CONTRASTILE_BUILD) CONTRASTILE_CUDA=$(CONTRASTILE_CUDA) $(PIP) --editable .
	@touch $@

# One stamp for each extra of pyproject.toml: the installed package is kept, what the extra adds is installed.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(VENV)/.package
	@echo "installing what contrastile[$*] needs into $(VENV)"
	@$(PIP) "contrastile[$*]"
	@touch $@

# Other implementations to compare with. One that cannot be installed is reported, and its tests skip.
$(VENV)/.rivals: RIVALS := "--no-deps open_clip_torch>=3.3" "--no-deps lightly>=1.6" "--no-deps libauc>=2.0.1" \
    "sentence-transformers>=6.2" "pytorch-metric-learning>=2.9" "pykeops>=2.3"
$(VENV)/.gpu-rivals: RIVALS := "--no-deps memeff>=0.3.1" "--no-deps inf_cl>=1.2.1"
$(VENV)/.rivals $(VENV)/.gpu-rivals: $(VENV)/.package
	@echo "installing the implementations that contrastile is compared with into $(VENV)"
	@missing=; \
	for rival in $(RIVALS); do \
	    set -- $$rival; $(PIP) "$$@" || { echo "NOT INSTALLED: $$rival; its comparisons are skipped"; missing=1; }; \
	done; \
	test -n "$$missing" || touch $@

# The package as it is installed, for mypy: bench/ and kernels/ live beside python/contrastile.
build/typed:
	@rm -rf $@ && mkdir -p $@/contrastile
	@ln -s $(CURDIR)/python/contrastile/* $(CURDIR)/bench $(CURDIR)/kernels $@/contrastile/
