# make train   sets up .venv once and runs the default run (see conf/config.yaml)
# make test    sets up .venv once, then lint, format, types, tests and notebooks (small)
# make notebooks  sets up .venv once and executes every notebook at its full size, some minutes each
# make fuzz    broken command lines and spoilt run folders by the thousand, some twenty minutes (ARGS="seed=1")
# make mutants  plants the bugs of tests/mutants.yaml one by one: a test must find each, 25 minutes;
#               make mutants ARGS=stack  only those with this in their names
# make setup   only the set-up;  make clean   removes .venv and caches, never outputs

ARGS ?=
# Without the last option a test that kills its worker makes pytest-xdist wait for ever, and is not named.
IN_TWO := -n 2 --dist loadgroup --max-worker-restart=0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.rlx-installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: train test notebooks fuzz mutants setup clean
.DELETE_ON_ERROR:

train: $(STAMP)
	$(BIN)/python -m rlx.train $(ARGS)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	RLX_SMALL=1 $(BIN)/python -m pytest $(IN_TWO) --nbmake tests notebooks

notebooks: $(STAMP)
	$(BIN)/python -m pytest -v --nbmake --nbmake-timeout=1200 notebooks

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz.py $(ARGS)

mutants: $(STAMP)
	$(BIN)/python tests/mutants.py $(ARGS)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "rlx needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test,video,figures,notebook]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
