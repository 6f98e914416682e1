# One command for each habit; `make help` lists them. Each makes the virtual environment .venv when it is not there,
# with the versions in constraints.txt, and rebuilds the compiled core when its sources have changed.

# The first Python on PATH that is new enough; `make PYTHON=/path/to/python3.12 test` names another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
# A second one, with the oldest Triton that is supported; 3.6's interpreter fails with NumPy 2.4.
OLDEST := .venv-oldest-triton
OLDEST_PINS := s/^triton==.*/triton==3.6.0/; s/^numpy==2\.4\.[0-9]+/numpy==2.3.5/
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/installed.stamp
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

# Passed on to the command of the same name, as in `make demo DEMO_ARGS=--quick` or `make test TEST_ARGS="-k split -x"`.
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
RESOURCES_ARGS ?=
GPU_ARGS ?=
SANITIZE_CASES ?= 200

.PHONY: help install demo test test-slow test-oldest-triton test-oldest-transformers lint format bench bench-suite \
	triton-resources triton-resources-oldest cuda-resources sanitize gpu-suite doctor clean
.DELETE_ON_ERROR:

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-23s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with everything in it, the core built

# The build tools are installed first and used as they are (no build isolation): so they too have pinned versions.
$(INSTALLED): pyproject.toml constraints.txt $(NATIVE)
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer on PATH; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, not " + sys.version)'
	@echo "Installing the pinned requirements into $(VENV), and building the core: a few minutes the first time."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) install pip setuptools cmake ninja pybind11
	@HOPE_KERNELS_REQUIRE_CORE=1 $(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@

# Only what compiles and tests the Triton kernels: the compiled core is not needed for that.
$(OLDEST)/installed.stamp: constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer on PATH; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	@sed -E '$(OLDEST_PINS)' constraints.txt > $(OLDEST)/constraints.txt
	@PIP_CONSTRAINT=$(OLDEST)/constraints.txt $(OLDEST)/bin/python -m pip --disable-pip-version-check --quiet install \
		setuptools torch triton numpy rich pytest hypothesis
	@touch $@

demo: $(INSTALLED) ## verify, benchmark and train on real text, into demo_output/ (DEMO_ARGS=--quick: shorter)
	$(BIN)/hope-kernels demo $(DEMO_ARGS)

# Most tests keep one core busy: they run in as many processes as there are cores, up to four; each file in one of them, so
# that what it compiles is compiled once (what several files share, once in each process).
IN_PARALLEL := -n logical --maxprocesses 4 --dist loadfile
ONE_THREAD_EACH := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
# A test that hangs, in native code too, fails: its process prints the stacks of all threads and ends, and so does the run.
# None takes two minutes on a quiet machine.
NO_HANGS := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true --max-worker-restart 0

test: $(INSTALLED) ## the test-suite but its slow tier (TEST_ARGS: more for pytest, as -n0 for one process)
	$(ONE_THREAD_EACH) $(BIN)/python -m pytest $(IN_PARALLEL) $(NO_HANGS) --durations 10 $(TEST_ARGS)

test-slow: $(INSTALLED) ## the slow tier alone
	$(ONE_THREAD_EACH) $(BIN)/python -m pytest $(IN_PARALLEL) -m slow $(TEST_ARGS)

test-oldest-triton: $(OLDEST)/installed.stamp ## the Triton engine's tests with the oldest Triton (TEST_ARGS)
	$(OLDEST)/bin/python -m pytest tests/backends/test_triton.py tests/backends/test_triton_pairs.py $(TEST_ARGS) \
		tests/backends/test_triton_resources.py::test_the_committed_report_is_of_exactly_what_is_shipped

# Beside the one in .venv, before it on the path.
OLDEST_TRANSFORMERS := $(VENV)/transformers-5.22.2
test-oldest-transformers: $(INSTALLED) ## the tests of pre-trained models with the oldest transformers (TEST_ARGS)
	@test -d $(OLDEST_TRANSFORMERS)/transformers || $(BIN)/python -m pip --disable-pip-version-check --quiet install \
		--no-deps --target $(OLDEST_TRANSFORMERS) transformers==5.22.2
	$(ONE_THREAD_EACH) PYTHONPATH=$(abspath $(OLDEST_TRANSFORMERS)) \
		$(BIN)/python -m pytest $(IN_PARALLEL) $(NO_HANGS) tests/integrations $(TEST_ARGS)

# One build with the address and the undefined-behaviour sanitizer, one with the thread sanitizer; the cases run on every
# instruction set this processor has.
sanitize: $(INSTALLED) ## the CPU engine over random problems under the sanitizers (SANITIZE_CASES=200)
	@for kind in address,undefined thread; do \
		build=build/sanitize-$${kind%,*}; \
		$(BIN)/cmake -S . -B $$build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python \
			-DCMAKE_BUILD_TYPE=None -DHOPE_KERNELS_SANITIZE=$$kind -DHOPE_KERNELS_CUDA=OFF > /dev/null && \
		$(BIN)/cmake --build $$build --target sanitize_driver || exit 1; \
		for isa in $$($(BIN)/python -c 'from hope_kernels import _core; print(*_core.isas())'); do \
			echo "$$kind, $$isa:" && HOPE_KERNELS_CPU_ISA=$$isa $$build/sanitize_driver $(SANITIZE_CASES) || exit 1; \
		done; \
	done

lint: $(INSTALLED) ## ruff over everything
	$(BIN)/ruff check .

format: $(INSTALLED) ## let ruff repair what it can
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) ## every backend against the naive path (BENCH_ARGS="--shape S64")
	$(BIN)/hope-kernels bench $(BENCH_ARGS)

bench-suite: $(INSTALLED) ## the regression benchmarks, pytest-benchmark's tables
	$(BIN)/python -m pytest benchmarks $(BENCH_ARGS)

triton-resources: $(INSTALLED) ## bring the report of the Triton kernels' registers and spills up to date (RESOURCES_ARGS: --check)
	$(BIN)/python benchmarks/triton_resources.py $(RESOURCES_ARGS)

triton-resources-oldest: $(OLDEST)/installed.stamp ## the same with the oldest Triton
	$(OLDEST)/bin/python benchmarks/triton_resources.py $(RESOURCES_ARGS)

cuda-resources: $(INSTALLED) ## registers, shared memory and spills of the CUDA kernels; nvcc, no GPU (RESOURCES_ARGS)
	$(BIN)/python benchmarks/cuda_resources.py $(RESOURCES_ARGS)

# Not in .venv: a machine with a GPU has its own torch and Triton, and perhaps no network to install others.
gpu-suite: ## everything that needs a GPU, within ten minutes, with the PYTHON at hand (GPU_ARGS="--stage bench")
	$(PYTHON) benchmarks/gpu_suite.py $(GPU_ARGS)

doctor: $(INSTALLED) ## this machine, its versions and backends, and what is missing
	$(BIN)/hope-kernels doctor

clean: ## remove what builds and runs leave behind, .venv included
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info demo_output gpu_suite_output .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f hope_kernels/_core*.so hope_kernels/_build_info.json
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
