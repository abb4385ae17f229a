# Two commands do all the set-up: `make demo` and `make test`. Both make .venv first where it is missing.
PYTHON ?= $(or $(shell command -v python3.11),python3)
DATA ?= data
VENV := .venv
BIN := $(VENV)/bin

# glibc gives freed memory back at once and pays a page fault for every page it takes again: keep it instead.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 1000000000000
export MALLOC_TOP_PAD_ = 268435456

.PHONY: demo test lint format benchmark clean

demo: $(VENV)/installed  ## train and evaluate on the built-in data, in minutes
	$(BIN)/python -m experiments.quickstart

test: $(VENV)/installed  ## the default ring of tests, under 2 minutes: two at a time, each on one thread
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

benchmark: $(VENV)/installed  ## speed of the main path; Omniglot is expected below DATA
	$(BIN)/python -m experiments.speed.main_path --data-root $(DATA)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
