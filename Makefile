# csm-weights: `make` shows what there is.
#
# Variables: MODEL=csm-1b  ONLY=safetensors  DEST=folder  SOURCE=auto  URL='https://mirror ...'
#            CONSUME=yes  SEAL=yes  SMOKE=no  PYTHON=python3.11

MODEL  ?= csm-1b
ONLY   ?=
DEST   ?=
SOURCE ?= auto
URL    ?=
CONSUME ?=
SEAL   ?=
SMOKE  ?= yes
FUZZ_SECONDS ?= 300
PYTHON ?= python3

VENV ?= .venv
INV  := $(VENV)/bin/inv
PIP  := $(VENV)/bin/pip --disable-pip-version-check --quiet install --constraint constraints.txt
SEALED := $(if $(filter yes,$(SEAL)),--seal)
WHAT := --model '$(MODEL)' $(if $(ONLY),--only '$(ONLY)') $(if $(DEST),--dest '$(DEST)')
FROM := --source '$(SOURCE)' $(foreach url,$(URL),--url '$(url)')
GOING := $(if $(filter yes,$(CONSUME)),--consume)

# Running the model needs torch; proving the files does not.
ifeq ($(SMOKE),no)
RUN_ENV   := $(VENV)/.base
SMOKE_OPT := --no-smoke
else
RUN_ENV   := $(VENV)/.smoke
endif

.DEFAULT_GOAL := help
.PHONY: help weights doctor status fetch place verify attest smoke seed-cache compare split lock \
	standin clean test lint test-full test-integration test-gpu messages torture bench \
	bench-download bench-load fuzz scanners

help: ## Show this help
	@echo "make TARGET [MODEL=csm-1b] [ONLY=safetensors] [DEST=folder] [SOURCE=hf] [SMOKE=no]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

weights: $(VENV)/.base ## Assemble, place, gate and smoke-test MODEL: the whole line
	@# What is missing is told before torch is installed.
	@$(INV) weights $(WHAT) $(FROM) $(GOING) --dry > /dev/null
	@$(MAKE) --silent --no-print-directory $(RUN_ENV)
	@$(INV) weights $(WHAT) $(FROM) $(GOING) $(SEALED) $(SMOKE_OPT)

doctor: $(VENV)/.base ## Find out what stands in the way of weights, before it fetches anything
	@$(INV) doctor $(WHAT) $(FROM) $(SMOKE_OPT)

status: $(VENV)/.base ## Show what is here, what is missing, and what would be done
	@$(INV) status $(WHAT) $(FROM) $(GOING)

fetch: $(VENV)/.base ## Bring the files into output/, proven
	@$(INV) fetch $(WHAT) $(FROM) $(GOING) $(SEALED)

place: $(VENV)/.base ## Move proven files from output/ to their place
	@$(INV) place $(WHAT) $(SEALED)

verify: $(VENV)/.base ## Hash every file in place again and run all gates
	@$(INV) verify $(WHAT)

attest: $(VENV)/.attest ## Write where the files come from, signed with KEY=file or NEW_KEY=file
	@$(INV) attest $(WHAT) $(if $(KEY),--key '$(KEY)') $(if $(NEW_KEY),--new-key '$(NEW_KEY)')

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

messages: $(VENV)/.test ## Write docs/messages.md anew: every message of the package, to be read
	@UPDATE_GOLDEN=1 $(VENV)/bin/python -m pytest -q tests/commands/test_messages.py

torture: $(VENV)/.test ## Kill, cut off, race and deceive every command (SEED=1 MINUTES=10)
	@$(VENV)/bin/python -m tools.torture $(if $(SEED),--seed $(SEED)) \
		$(if $(MINUTES),--minutes $(MINUTES))

fuzz: $(VENV)/.fuzz ## Fuzz the readers of manifests and weights, FUZZ_SECONDS=300 each
	@set -e; for target in manifest safetensors checkpoint; do \
		$(VENV)/bin/python -m tools.fuzz $$target $(VENV)/corpus \
			-max_total_time=$(FUZZ_SECONDS) -print_final_stats=1; \
	done

scanners: $(VENV)/.test ## Hold the hostile files of the tests before other scanners (docs/security-table.md)
	@$(VENV)/bin/python -m benchmarks.scanners

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

$(VENV)/.attest: $(VENV)/.base
	@$(PIP) --editable '.[attest]'
	@touch $@

$(VENV)/.smoke: $(VENV)/.base
	@echo "installing torch (SMOKE=no does without) ..." >&2
	@$(PIP) --editable '.[smoke]'
	@touch $@

$(VENV)/.test: $(VENV)/.smoke
	@echo "installing what the tests need ..." >&2
	@$(PIP) --editable '.[smoke,test]'
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	@$(PIP) --editable '.[fuzz]'
	@touch $@
