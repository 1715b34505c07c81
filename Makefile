# make demo   train a small model, watch depth pay, find picture, table and checkpoint in runs/demo
# make test   lint, types and the whole test suite
# make docs   the documentation as a site, in site/
# make notebooks   run them again, and keep what they print and draw
#
# All make .venv if there is none. To use a torch of your own (CUDA, 2.11 or later), install it into .venv first,
# or make the environment with: python3 -m venv --system-site-packages .venv

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.open-mythos-installed

.PHONY: demo test docs notebooks lint install clean

demo: install
	$(BIN)/mythos demo

test: install lint
	$(BIN)/python -m pytest

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Next: open site/index.html, or $(BIN)/python -m mkdocs serve"

notebooks: install
	$(BIN)/python notebooks/execute.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs site build dist *.egg-info
