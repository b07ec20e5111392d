# Two commands: `make demo` runs the main job, `make test` passes the tests. Both first make .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# processes that the tests run in; each uses one thread for torch
TEST_PROCESSES ?= 2
DOCS_VENV ?= .venv-docs
# without bytecode, which 45 s would be spent on: what is imported is compiled then
PIP = -m pip install -q --no-compile --disable-pip-version-check
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*)

# Bytecode beside the environment, also where PYTHONDONTWRITEBYTECODE says none: a process that imports TRL starts in 11 s
# with it, in 25 s without, and the tests start many
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX = $(abspath $(VENV))/bytecode

.PHONY: test test-trl versions demo lint lint-python lint-cpp docs bench mutation clean

# worksteal: a module's tests, and what is made once for them, mostly stay in one process
test: lint
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -q

demo: $(VENV)/ready
	$(BIN)/python -m examples.demo --output-dir demo-output

# C++ is read while pip, on one core, brings what Python's part needs
lint:
	@$(MAKE) --no-print-directory --jobs=2 lint-cpp lint-python

lint-python: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-cpp: $(VENV)/torch
	PYTHONPATH=. $(BIN)/python tests/lint_cpp.py

# the documentation as web pages, docs/_build/index.html; a warning is an error
docs: $(DOCS_VENV)/ready
	$(DOCS_VENV)/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build

# wrong signs, factors, detaches and clamps in the objectives: does a test see each? A few minutes of two cores
mutation: $(VENV)/ready
	$(BIN)/python tests/mutation.py --processes $(TEST_PROCESSES)

# FusedDPOTrainer beside TRL's: every loss, adapter, reference and accumulation, not only a covering choice of them
test-trl: $(VENV)/ready
	SPO_TEST_TRL=everything $(BIN)/python -m pytest -n $(TEST_PROCESSES) -q tests/integrations tests/losses/test_trl.py

# what depends on versions, against other ones of torch, Triton and transformers: gigabytes for each, half an hour
versions:
	$(PYTHON) tests/versions.py --processes $(TEST_PROCESSES)

bench: $(VENV)/ready
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt cut-cross-entropy liger-kernel triton trl
	$(BIN)/python -m benchmarks.run

# the tests compile the CUDA extension themselves, where there is nvcc
$(VENV)/ready: $(VENV)/torch pyproject.toml setup.py spo_kernels/backends/build.py $(SOURCES)
	SPO_SKIP_CUDA_BUILD=1 $(BIN)/python $(PIP) -c constraints.txt -e ".[test,lint]"
	touch $@

# torch first, pinned: without the pin pip would take the newest build and its CUDA packages; and what reads C++
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python $(PIP) -c constraints.txt numpy pybind11 clang-format clang-tidy
	touch $@

# what docstrings are read with: torch, and no extension, which would have to be compiled; the rest is the extra "docs"
$(DOCS_VENV)/ready: Makefile constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(PIP) -c constraints.txt \
		"$$(grep '^torch==' constraints.txt)" numpy filelock furo latex2mathml myst-parser sphinx
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) docs/_build build dist *.egg-info demo-output spo_kernels/*.so
