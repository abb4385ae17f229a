# Two commands do all the set-up: `make demo` and `make test`. Both make .venv first where it is missing.
PYTHON ?= $(or $(shell command -v python3.11),python3)
DATA ?= data
VENV := .venv
BIN := $(VENV)/bin

# glibc gives freed memory back at once and pays a page fault for every page it takes again: keep it instead.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 1000000000000
export MALLOC_TOP_PAD_ = 268435456

.PHONY: demo test test-long test-lowest test-newest lint format docs tables pictures notebooks benchmark clean

demo: $(VENV)/installed  ## train and evaluate on the built-in data, in minutes
	$(BIN)/python -m experiments.quickstart

# two tests at a time, each on one thread
RING = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(1)/bin/python -m pytest -n 2 --dist worksteal

test: $(VENV)/installed  ## the default tests, 2 to 3 minutes
	$(call RING,$(VENV))

test-long: $(VENV)/installed  ## those of whole programs: reports, searches, several processes, kills, a browser; 2 minutes
	$(call RING,$(VENV)) -m 'long and not slow'

# Both on other versions than the pinned ones, each time in a new environment: `make test-lowest PYTHON=python3.12`.
# (Downloads 2 to 5 GB the first time: torch comes with CUDA.)
BOTH = -m 'not slow and not gpu and not docs'
export UV_HTTP_TIMEOUT ?= 600

test-lowest: $(VENV)/installed  ## the oldest versions that pyproject.toml allows
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest --resolution lowest-direct -e '.[dev]'
	$(call RING,.venv-lowest) $(BOTH)

test-newest: $(VENV)/installed  ## the newest versions of everything
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-newest
	$(BIN)/uv pip install --quiet --python .venv-newest -e '.[dev]'
	$(call RING,.venv-newest) $(BOTH)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed  ## the pages as a site, build/docs/index.html, where a warning is an error; and their code runs
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	$(call RING,$(VENV)) -m docs tests/test_docs.py

tables: $(VENV)/installed  ## README's and the pages' tables, from the CSV files of docs
	$(BIN)/python docs/render.py

notebooks: $(VENV)/installed  ## docs/notebooks, from the pages
	$(BIN)/python docs/notebooks.py

pictures: $(VENV)/installed  ## docs/pictures, from two trainings (15 minutes, once) and the CSV files of docs
	$(BIN)/python docs/pictures.py

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

benchmark: $(VENV)/installed  ## speed of the main path; Omniglot is expected below DATA
	$(BIN)/python -m experiments.speed.main_path --data-root $(DATA)

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
