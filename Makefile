# `make help` lists what there is. Every command sets up its environment in .venv itself.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(wildcard book/*.ipynb)
PROSE := book lora tests $(wildcard *.md) Makefile

.PHONY: help book pdf test style mutants sync run reproduce lab clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Anew when the requirements change; a failed installation leaves no stamp behind.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

book: .venv/installed  ## build the book; a warning is an error
	$(BIN)/jupyter-book build --all --quiet -W -n --keep-going .
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

pdf: book  ## build the book, then one PDF of it, which the pages offer (needs Chromium or Chrome)
	$(BIN)/python tools/pdf.py

test: .venv/installed  ## check style, run the unit tests, then every cell against its stored output
	$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet .
	$(BIN)/codespell $(PROSE)
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest --nbval --nbval-current-env $(NOTEBOOKS)

style: .venv/installed  ## format the code, also in notebooks, and mend what the linter can
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	$(BIN)/codespell $(PROSE)

mutants: .venv/installed  ## break lora/ in one place at a time: does a test fail? (ONLY='lora.core.*' for some)
	$(BIN)/python tests/mutants.py $(ONLY)

sync: .venv/installed  ## rewrite the listings in the chapters from lora/
	$(BIN)/python tests/listings.py sync

run: .venv/installed  ## sync, execute the chapters and store their outputs (ONLY=NAME for one)
	$(BIN)/python tests/listings.py run $(ONLY)

reproduce: .venv/installed  ## the chapters on 1 and 2 threads, with plain and with vector instructions
	@set -e; for machine in LC_ALL=C.UTF-8 ATEN_CPU_CAPABILITY=default; do for n in 1 2; do \
	  echo "$$machine OMP_NUM_THREADS=$$n"; env $$machine OMP_NUM_THREADS=$$n \
	  $(BIN)/python -m pytest -q --nbval --nbval-current-env $(NOTEBOOKS); done; done

lab: .venv/installed  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab book

clean:  ## remove the built book, keep the environment
	rm -rf _build _mutants
