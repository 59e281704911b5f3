# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EVAL_VENV := .venv-eval
OUT ?= runs/demo
SEED ?= 0

.PHONY: demo test test-eval test-faults audit-dependencies evidence lint format world clean

demo: $(VENV)/.installed  ## the method on the embedded world, base to iteration 3
	$(BIN)/csr demo --seed $(SEED) --out $(OUT)

test: $(VENV)/.installed-dev lint  ## every check that CI runs
	$(BIN)/pytest -q

test-eval: $(EVAL_VENV)/.installed  ## the bridge to lmms-eval, offline, in an environment of its own
	$(EVAL_VENV)/bin/python -m pytest -q tests/eval

test-faults: $(VENV)/.installed-dev  ## a hundred kills, failing disks, a thousand bad inputs (about half an hour)
	CSR_FAULTS=all $(BIN)/pytest -q -s -p no:xdist tests/faults

audit-dependencies:  ## known vulnerabilities of the pinned packages; needs the network
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install -q --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --progress-spinner off --disable-pip --no-deps -r constraints.txt

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

evidence: $(VENV)/.installed  ## every table and plot of docs/evidence (hours; goes on where it was stopped)
	$(BIN)/csr world build --world market --out build/evidence/models/market
	$(BIN)/csr world build --grow-from src/csr_vlm/world/assets --out build/evidence/models/larger
	$(BIN)/python benchmarks/evidence.py run --out build/evidence
	$(BIN)/python benchmarks/evidence.py write --out build/evidence --to docs/evidence

world: $(VENV)/.installed  ## train the world's base models again (about 40 minutes on two cores)
	$(BIN)/csr world build --out build/world --seed 0

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' num2words
	# The registry's torchvision is a CUDA build: its Python part serves the tests of some processors, but beside
	# a CPU build of torch it must not be in the way of anything else. So it lies where only the tests look.
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/only-for-tests torchvision
	touch $@

$(EVAL_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(EVAL_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	touch $@

clean:
	rm -rf $(VENV) $(EVAL_VENV) .venv-audit runs build .cache
