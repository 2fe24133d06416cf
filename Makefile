# make demo        school the demo's assistant (about ten minutes on two cores), then talk to it
# make demo-long   the same lesson for an hour: a larger model, more facts
# make test        the tests, with lint; make test-slow: the learning tests over seeds, and other people's clients
#                  (LangChain, lm-evaluation-harness) against the server
# make lint        ruff and mypy
# make clean       remove what was built (not the runs)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo demo-long test test-slow lint install clean

demo demo-long: $(VENV)/.installed
	$(BIN)/lyceum run $@
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/lyceum chat runs/$@; fi

test: lint
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-peers
	$(PYTEST) -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/.installed-test

# pip prefers a wheel of torch that is already here, or in PIP_FIND_LINKS; the README says how to get its CPU build
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $$($(PYTHON) --version) is too old" >&2; echo "hint: make PYTHON=python3.11 (or newer)" >&2; exit 2; }
	[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

# lm_eval without its dependencies: they are for its tasks (scikit-learn, nltk, ...), and the tests need its models alone, which take
# what is in `peers`. So `pip check` is right to complain of it
$(VENV)/.installed-peers: $(VENV)/.installed-test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[peers]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps lm_eval
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lyceum tests -name __pycache__ -type d -prune -exec rm -rf {} +
