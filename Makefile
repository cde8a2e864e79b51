# csm-weights: `make` shows what there is.
#
# Variables: MODEL=csm-1b  ONLY=safetensors  DEST=folder  SOURCE=auto  URL='https://mirror ...'
#            SMOKE=no  PYTHON=python3.11

MODEL  ?= csm-1b
ONLY   ?=
DEST   ?=
SOURCE ?= auto
URL    ?=
SMOKE  ?= yes
PYTHON ?= python3

VENV ?= .venv
INV  := $(VENV)/bin/inv
PIP  := $(VENV)/bin/pip --disable-pip-version-check --quiet install --constraint constraints.txt
WHAT := --model '$(MODEL)' $(if $(ONLY),--only '$(ONLY)') $(if $(DEST),--dest '$(DEST)')
FROM := --source '$(SOURCE)' $(foreach url,$(URL),--url '$(url)')

# Running the model needs torch; proving the files does not.
ifeq ($(SMOKE),no)
RUN_ENV   := $(VENV)/.base
SMOKE_OPT := --no-smoke
else
RUN_ENV   := $(VENV)/.smoke
endif

.DEFAULT_GOAL := help
.PHONY: help weights doctor status fetch place verify smoke seed-cache compare split lock standin \
	clean test lint test-full test-integration test-gpu bench bench-download bench-load

help: ## Show this help
	@echo "make TARGET [MODEL=csm-1b] [ONLY=safetensors] [DEST=folder] [SOURCE=hf] [SMOKE=no]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

weights: $(VENV)/.base ## Assemble, place, gate and smoke-test MODEL: the whole line
	@# What is missing is told before torch is installed.
	@$(INV) weights $(WHAT) $(FROM) --dry > /dev/null
	@$(MAKE) --no-print-directory $(RUN_ENV)
	@$(INV) weights $(WHAT) $(FROM) $(SMOKE_OPT)

doctor: $(VENV)/.base ## Find out what stands in the way of weights, before it fetches anything
	@$(INV) doctor $(WHAT) $(FROM) $(SMOKE_OPT)

status: $(VENV)/.base ## Show what is here, what is missing, and what would be done
	@$(INV) status $(WHAT) $(FROM)

fetch: $(VENV)/.base ## Bring the files into output/, proven
	@$(INV) fetch $(WHAT) $(FROM)

place: $(VENV)/.base ## Move proven files from output/ to their place
	@$(INV) place $(WHAT)

verify: $(VENV)/.base ## Hash every file in place again and run all gates
	@$(INV) verify $(WHAT)

smoke: $(VENV)/.smoke ## Load the model, let it speak, and check it
	@$(INV) smoke $(WHAT)

seed-cache: $(VENV)/.base ## Give the files in place to the Hub's cache, for other programs
	@$(INV) seed-cache $(WHAT)

compare: $(VENV)/.base ## Show that MODEL's two formats, or FILE='one other', hold equal tensors
	@$(INV) compare --model '$(MODEL)' $(if $(DEST),--dest '$(DEST)') \
		$(foreach file,$(FILE),--file '$(file)')

clean: $(VENV)/.base ## Remove unfinished files of MODEL
	@$(INV) clean $(if $(DEST),--dest '$(DEST)') --model '$(MODEL)'

split: $(VENV)/.base ## Cut FILE=... into parts with digests and a manifest entry
	@$(INV) split '$(FILE)'

lock: $(VENV)/.base ## Add digests that proven files show to MODEL's manifest
	@$(INV) lock --model '$(MODEL)'

standin: $(VENV)/.base ## Write a full-size stand-in of CSM-1B (needs 25 GB of disk)
	@$(INV) standin

test: $(VENV)/.test ## Run the tests
	@$(VENV)/bin/python -m pytest -n auto

lint: $(VENV)/.test ## Check style, types and the shell script
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck recombine.sh .ci/run

test-full: $(VENV)/.test ## Run the tests that need root, 45 GB of disk, or minutes
	@$(VENV)/bin/python -m pytest -m full tests

test-integration: $(VENV)/.test ## Run the tests against nginx and other releases of huggingface_hub
	@$(VENV)/bin/python -m pytest -m integration tests

test-gpu: $(VENV)/.test ## Run the tests that need an NVIDIA GPU
	@$(VENV)/bin/python -m pytest -m gpu tests

bench: $(VENV)/.base ## Measure against cat and sha256sum at full size (needs 40 GB of disk)
	@$(VENV)/bin/python -m benchmarks.line

bench-download: $(VENV)/.test ## Measure downloads against hf, curl and aria2c (25 GB of disk, nginx)
	@$(VENV)/bin/python -m benchmarks.download --full

bench-load: $(VENV)/.test ## Measure loading, and on a GPU speaking, against safetensors and torch (38 GB of disk)
	@$(VENV)/bin/python -m benchmarks.load

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11; say make PYTHON=python3.11" >&2; exit 1; }
	@echo "setting up $(VENV) ..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.smoke: $(VENV)/.base
	@echo "installing torch (SMOKE=no does without) ..." >&2
	@$(PIP) --editable '.[smoke]'
	@touch $@

$(VENV)/.test: $(VENV)/.smoke
	@echo "installing what the tests need ..." >&2
	@$(PIP) --editable '.[smoke,test]'
	@touch $@
