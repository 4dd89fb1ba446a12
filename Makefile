# Everything happens in .venv; a second call skips the set-up. `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
JOBS ?= 2
# Linux: torch from PyPI brings gigabytes of CUDA. `make demo TORCH_INDEX=<an index of CPU wheels>` avoids that.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SETTINGS := settings.ini setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow torture bench bench-circuits notebooks check nbdev3 readme docs lab clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gausssafe needs Python >= 3.11, and $(PYTHON) is older or missing: try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: $(BIN)/python $(SETTINGS)
	@echo "Installing gausssafe and what it stands on into $(VENV) (once, some minutes) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	@echo "Installing the developers' tools into $(VENV) (once) ..."
	$(PIP) -e '.[dev,docs]'
	@touch $@

$(VENV)/.lab: $(VENV)/.user
	$(PIP) -e '.[lab]'
	@touch $@

demo: $(VENV)/.user  ## a GAN on quantum noise, one on classical, and a run that must fail: a batch within 3 GB, and its report
	$(BIN)/gausssafe batch nbs/experiments/demo.json --results $(DEMO) --jobs 2 --memory 3GB

test: $(VENV)/.dev  ## the fast tests and every notebook, under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not torture and not gpu"

test-slow: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

torture: $(VENV)/.dev $(VENV)/.lab  ## kill, flood and starve it, many times over
	$(BIN)/python -m pytest -m torture --timeout 1800

bench: $(VENV)/.dev  ## measure us against the reports' way; tables and JSON in benchmarks/results
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

bench-circuits: $(VENV)/.dev  ## circuits against their peers (those that are installed): table, figure and JSON in benchmarks/results
	$(BIN)/python benchmarks/circuits.py

notebooks: $(VENV)/.dev  ## export the notebooks to gausssafe/ and clean them
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean

check: notebooks nbdev3  ## before you commit: export, clean, lint, README, and the same export under nbdev 3
	$(BIN)/ruff check tests nbs benchmarks tools setup.py
	$(BIN)/python tools/readme.py --check
	$(BIN)/python tools/nbdev3.py

nbdev3: .venv-nbdev3/.done
.venv-nbdev3/.done:
	$(PYTHON) -m venv .venv-nbdev3
	.venv-nbdev3/bin/python -m pip install --quiet --disable-pip-version-check 'nbdev>=3.3,<3.4'
	@touch $@

readme: $(VENV)/.dev  ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: $(VENV)/.dev  ## build the documentation site into _docs (no quarto needed)
	$(BIN)/python tools/docs.py

lab: $(VENV)/.lab  ## JupyterLab, with a kernel that is held at 2 GB
	$(BIN)/gausssafe kernel install --memory-limit 2GB
	$(BIN)/jupyter lab nbs

clean:  ## remove what was built here, and the environments
	rm -rf $(VENV) .venv-nbdev3 $(DEMO) _docs _proc build *.egg-info .pytest_cache .hypothesis .ruff_cache
