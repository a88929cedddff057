# make run    sets up .venv and runs the main job        make test   sets up .venv and passes the tests
# `make help` lists the rest.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# PyTorch's CPU builds; on Linux the wheels of the default index carry CUDA. Skipped with one warning where it cannot be reached.
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
# the one torch 2.13 is built for; CUDA builds of torch bring it themselves
TRITON := triton==3.7.1
PIP := $(BIN)/python -m pip --disable-pip-version-check
# of `make notebook-runs`: smoke, laptop or gpu
TIER ?= smoke

.PHONY: setup run test solved-test browser-test lint types docs package installed notebooks notebook-runs workshop badges clean help
.DEFAULT_GOAL := help

setup: $(STAMP)

# torch first and alone, so that nothing after it can bring another build in; done once, and again when the lock changes
$(STAMP): requirements.lock pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; run: make setup PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --retries 1 --timeout 30 --no-deps $(TORCH_INDEX) "$$(grep '^torch==' requirements.lock)"
	$(PIP) install --quiet -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)

run: setup
	$(BIN)/vlmedit train main

# Triton's interpreter runs the kernels on a CPU; where it cannot be installed their tests are skipped and say so
test: setup
	[ "$$(uname)" != Linux ] || $(PIP) install --quiet --no-deps $(TRITON) || true
	$(BIN)/python -m pytest -n 2 -q

# minutes, not in `test`: all notebooks with their stubs solved, and with all cells run again
solved-test: setup
	$(BIN)/python -m pytest -n 2 -q -m solved tests/teaching/test_notebooks.py

# needs Chromium, the system's or another one named by VLMEDIT_CHROMIUM; skipped where there is none
browser-test: setup
	$(PIP) install --quiet -e ".[browser]" --no-build-isolation
	$(BIN)/python -m pytest -q -rs -m browser tests/teaching/test_browser.py

# code, layout and types; mypy looks at the modules that pyproject.toml names
lint: setup types
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(PIP) install --quiet --no-build-isolation -e ".[lint]"
	$(BIN)/mypy

# the site in site/: fails for a link that leads nowhere
docs: setup
	$(PIP) install --quiet --no-build-isolation -e ".[docs]"
	$(BIN)/mkdocs build --strict

# a wheel and a source distribution in dist/, and the tests that use them in environments of their own
package: setup
	rm -rf build *.egg-info dist/vlmedit-*
	$(BIN)/python -c "from setuptools import build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"
	rm -rf build *.egg-info
	$(BIN)/python -m pytest -q tests/test_packaging.py

# the wheel of `make package` with its dependencies from the index, in a new environment and a new folder
installed:
	folder="$$(mktemp -d)" && wheel="$$(ls $(CURDIR)/dist/vlmedit-*.whl)" && $(PYTHON) -m venv "$$folder/venv" && cd "$$folder" \
	&& venv/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH_INDEX) "$$wheel[train,notebooks]" \
	&& venv/bin/vlmedit doctor --quick && venv/bin/vlmedit eval --n 32 && venv/bin/vlmedit notebook copy mine \
	&& venv/bin/vlmedit notebook run mine/00_start_here.ipynb -p TIER=smoke

# the committed outputs
notebooks: setup
	$(BIN)/vlmedit notebook refresh all

# by papermill, into runs/notebooks; the committed notebooks stay as they are
notebook-runs: setup
	$(BIN)/vlmedit notebook run all -p TIER=$(TIER) --out runs/notebooks --json runs/notebooks/timings.json

workshop: setup
	$(BIN)/python -m vlmedit.teaching.workshop dist

badges: setup
	$(BIN)/python -m vlmedit.teaching.badges dist/colab

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@echo "make run     set up .venv (once) and run the main job: the live no-pair training, edits, pictures, metrics"
	@echo "make test    set up .venv (once) and pass the tests"
	@echo "make solved-test   run the notebooks with every exercise solved, and with all cells run again (about twice as long as test)"
	@echo "make browser-test  move the notebooks' widgets in a real browser; needs Chromium"
	@echo "make lint    check code, layout and types"
	@echo "make docs    build the site into site/"
	@echo "make package build a wheel and a source distribution into dist/ and test them outside the checkout; then: make installed"
	@echo "make setup   set up .venv alone; repeats nothing unless the lock changed"
	@echo "make notebooks  run the notebooks at the laptop tier and keep their outputs in them"
	@echo "make notebook-runs TIER=smoke  run them and keep nothing"
	@echo "make workshop   write the zips for participants and for the teacher into dist/"
	@echo "make badges     write the badges for Binder and Colab into README.md and the notebooks for Colab into dist/colab"
	@echo "make clean   remove .venv and caches; run folders stay"
	@echo
	@echo "On a GPU (Linux): make clean, then    make setup TORCH_INDEX=    which takes torch from the default index, built for CUDA"
