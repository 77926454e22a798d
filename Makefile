# make demo: compile examples/gpt2.py and print its report. make test: run the tests.
# Both make .venv first, which takes minutes once and nothing after. Needs Python 3.11 or later, and make.

PYTHON ?= python3
VENV ?= .venv
# Torch comes as the package index has it, on the usual one with CUDA. For the much smaller CPU build name PyTorch's
# CPU index: make demo INDEX=--index-url=... Another version: make test TORCH='torch==2.11.0'. Triton follows torch,
# which pins it.
TORCH ?= torch==2.13.0
INDEX ?=
OUT ?= out/demo

PIP = $(VENV)/bin/python -m pip
INSTALL = $(PIP) install --quiet --disable-pip-version-check "$(TORCH)" "numpy<2.4"

.PHONY: demo test clean help
.DELETE_ON_ERROR:

help:
	@sed -n '1,2p' Makefile

demo: $(VENV)/.demo-ready
	$(VENV)/bin/morphc compile examples/gpt2.py -o $(OUT)

test: $(VENV)/.test-ready
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --ignore=tests/gpu
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -rs tests/gpu

$(VENV)/.demo-ready: pyproject.toml $(VENV)/.torch-ready
	$(INSTALL) -e '.[hf]'
	@touch $@

$(VENV)/.test-ready: pyproject.toml $(VENV)/.torch-ready
	$(INSTALL) -e '.[test]'
	@touch $@

# On its own, so that the CPU index is asked for torch alone: everything else would be looked up there too.
$(VENV)/.torch-ready: | $(VENV)/bin/python
	$(PIP) install --quiet --disable-pip-version-check --no-deps $(INDEX) "$(TORCH)"
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "morphc needs Python 3.11 or later; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) can't make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
