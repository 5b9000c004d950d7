# make demo and make test set everything up from nothing; they need Python 3.10 or newer, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PINS := setup.cfg constraints.txt
OLD := vmamba needs Python 3.10 or newer; choose one with make PYTHON=/path/to/python3. Found
ARGS ?=
JOBS ?= 2
.NOTPARALLEL:

.PHONY: help demo mm test test-gpu lint format bench clean distclean

help:
	@echo "make demo      segment an MRI with VM-UNet, from a bare machine"
	@echo "make mm        mmdet and mmseg with mmcv's operators, which are compiled once and kept in the user's cache"
	@echo "make test      all tests, JOBS=2 at a time (ARGS=... goes to pytest)"
	@echo "make test-gpu  the tests that need a CUDA GPU"
	@echo "make lint      ruff and pyright;  make format: ruff repairs what it can"
	@echo "make bench     time networks against timm's (ARGS=operators: the operators; ARGS='models --batch 8': options)"
	@echo "make clean     remove what the above wrote;  make distclean: $(VENV) too"

demo: $(VENV)/.medical
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m vmamba.tools.demo $(ARGS)

mm: $(VENV)/.mm

test: $(VENV)/.dev $(VENV)/.mm
	VMAMBA_TEST_MM=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --durations=15 $(ARGS)

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.medical
	$(BIN)/python -m vmamba.tools.cli benchmark $(or $(ARGS),models)

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache lightning_logs
	find . -name $(VENV) -prune -o -name __pycache__ -type d -print -prune | xargs rm -rf

distclean: clean
	rm -rf $(VENV)

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "$(OLD) no '$(PYTHON)'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("$(OLD) %d.%d." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# setuptools, wheel, ninja and psutil build mmcv, mmdet and mmseg; OpenCV without windows needs no libraries of a desktop
$(VENV)/.mm: $(PINS) tools/mmcv_wheel.py | $(VENV)/.python
	@echo "installing vmamba[mm] into $(VENV); mmcv's operators take about 12 minutes on two cores, once"
	$(PIP) pip setuptools wheel ninja psutil
	$(PIP) --no-build-isolation --editable .
	wheels=$$($(BIN)/python -m vmamba.tools.mmcv_wheel) && \
	$(PIP) --no-build-isolation --find-links "$$wheels" --only-binary onedl-mmcv --editable '.[mm]'
	$(PIP) --force-reinstall --no-deps opencv-python-headless
	@touch $@

$(VENV)/.medical $(VENV)/.dev: $(VENV)/.%: $(PINS) | $(VENV)/.python
	@echo "installing vmamba[$*] into $(VENV); the first time this takes minutes and about 6 GB"
	$(PIP) pip setuptools
	$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@
