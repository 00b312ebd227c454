# Both targets make their own virtual environment; they need Python 3.11 or newer and nothing else.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p))))
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-browser lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m repo_jax.quickstart

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Needs Debian's chromium and chromium-driver; `make test` skips these tests where there are none.
test-browser: $(VENV)/.installed-test
	REPO_JAX_NEEDS_BROWSER=1 $(BIN)/python -m pytest tests/analysis/page/test_browser.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[plots]'
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
