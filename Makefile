# make test / make prove / make bench: everything on a fresh machine, from the virtual environment to the result.
PYTHON ?= python3
# One known-good torch. On a GPU machine: make test TORCH=torch (pip's CUDA build), or point VENV at yours.
TORCH ?= torch==2.13.0
VENV ?= .venv
# What tests run: this CPU's best, and what other CPUs fall back to.
CPU_ISAS ?= best,avx2,baseline
ARGS ?=
# Test processes side by side, one thread each: two OpenMP pools on the same cores slow each other down.
WORKERS ?= 2
# Tests take from milliseconds to minutes: a process that has none left takes some of another's.
PARALLEL := -n $(WORKERS) --dist worksteal
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv emulator test prove bench docs wheels lint clean

help:
	@echo "make test [ARGS=...]    set up $(VENV), build, check that all works here (pytest arguments)"
	@echo "make prove [ARGS=...]   the other tests: all chips and configurations, sanitizers, several processes, the docs' code"
	@echo "make bench [ARGS=...]   set up $(VENV), build, run the benchmarks (--quick, --cases, --list ...)"
	@echo "make docs               the documentation as a site: site/index.html"
	@echo "make wheels [ARGS=...]  build, repair and try the wheels: dist/ (--kinds cpu,cuda --python PATH)"
	@echo "make lint               ruff, clang-format, mypy"
	@echo "make clean              remove $(VENV) and build results"

venv: $(STAMP)
# torch first: asking pip for the extras alone would fetch its newest build. Rebuilt when the build files or sources change.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	WAVEMIX_KERNELS_CPU_ISAS="$(CPU_ISAS)" $(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

# CUDA kernels built for the host, which two test processes would wait for.
emulator: $(STAMP)
	$(BIN)/python -m tests.emulator.build

test: emulator
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not prove" $(ARGS)

prove: emulator
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m prove $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m wavemix_kernels bench $(ARGS)

# Nothing is imported: the pages of public names are read from the sources.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheels: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[release]"
	$(BIN)/python release/wheels.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist site *.egg-info wavemix_kernels/_core*.so
