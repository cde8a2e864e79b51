# csm-weights: `make` shows what there is.
#
# Variables: MODEL=csm-1b  ONLY=safetensors  DEST=folder  STAGING=folder  SOURCE=auto
#            URL='https://mirror ...'  CACHE='folder ...'  REVISION=commit  PATIENCE=60
#            LIMIT_RATE=20M  CONSUME=1  SEAL=1  SMOKE=0  PYTHON=python3.11

MODEL  ?= csm-1b
SOURCE ?= auto
SMOKE  ?= yes
FUZZ_SECONDS ?= 300
PYTHON ?= python3
VENV ?= .venv

SWITCHES := CONSUME SEAL SMOKE
KNOWN := MODEL ONLY DEST STAGING SOURCE URL CACHE REVISION PATIENCE LIMIT_RATE WITH REPORT FILE TO OUT TEXT \
	KEY NEW_KEY ADDRESS DIR NODES $(SWITCHES) FUZZ_SECONDS SEED MAX_SECONDS MINUTES PYTHON VENV

# Values are data: a call of make's functions in them is not made, here or in a recipe.
$(foreach name,$(KNOWN),$(eval override $(name) := $$(value $(name))))

given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
unknown := $(filter-out $(KNOWN) MAKEFLAGS,$(given))
$(if $(unknown),$(error there is no variable $(unknown); there are $(KNOWN)))

define newline


endef
$(foreach name,$(KNOWN),$(if $(findstring $(newline),$($(name))),$(error $(name) has a line end)))

yes := 1 yes true on y YES TRUE Yes True ON
no  := 0 no false off n NO FALSE No False OFF
$(foreach name,$(SWITCHES),$(if $(filter-out $(yes) $(no),$($(name)))$(word 2,$($(name))),\
	$(error $(name)=$($(name)): say $(name)=1 or $(name)=0)))

quoted = '$(subst ','\'',$(1))'
option = $(if $($(1)),--$(2) $(call quoted,$($(1))))
switch = $(if $(filter $(yes),$($(1))),--$(2))

WHAT  := --model $(call quoted,$(MODEL)) $(call option,ONLY,only) $(call option,DEST,dest)
AT    := $(call option,STAGING,staging)
FROM  := $(AT) $(call option,SOURCE,source) $(foreach url,$(URL),--url $(call quoted,$(url))) \
	$(foreach cache,$(CACHE),--cache $(call quoted,$(cache))) $(call option,REVISION,revision)
GOING := $(call switch,CONSUME,consume)
WAITING := $(call option,PATIENCE,patience) $(call option,LIMIT_RATE,limit-rate)
SEALED := $(call switch,SEAL,seal)
PAGE := $(call option,REPORT,report)

# The programs of a virtual environment name its Python by its path.
MOVED := echo "$(VENV) was made for another folder. Was this clone moved or renamed?" \
	"Remove $(VENV) and run the same command again." >&2; exit 1
INV := [ -x "$$(sed -n '1s/^..//p' $(VENV)/bin/inv)" ] || { $(MOVED); }; \
	CSM_WEIGHTS_TYPED=make $(VENV)/bin/inv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --constraint constraints.txt

# Running the model needs torch; verifying the files does not.
ifneq ($(filter $(no),$(SMOKE)),)
RUN_ENV   := $(VENV)/.base
SMOKE_OPT := --no-smoke
else
RUN_ENV   := $(VENV)/$(if $(WITH),.speak,.smoke)
endif

.DEFAULT_GOAL := help
.PHONY: help weights doctor status fetch place verify attest smoke seed-cache compare identify convert speak fleet report split lock \
	standin clean test lint damage test-full test-integration test-fleet test-torch test-gpu test-kernels messages torture torture-room \
	bench bench-download bench-gpu bench-load bench-ci bench-fleet fuzz scanners mutation

help: ## Show this help
	@echo "make TARGET [MODEL=csm-1b] [ONLY=ckpt] [DEST=folder] [SOURCE=hf] [SMOKE=0]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

weights: $(VENV)/.base ## Join or download, verify, install and smoke-test MODEL
	@# Report what is missing before torch is installed.
	@$(INV) weights $(WHAT) $(FROM) $(GOING) $(call option,WITH,with) --dry > /dev/null
	@$(MAKE) --silent --no-print-directory $(RUN_ENV)
	@$(INV) weights $(WHAT) $(FROM) $(GOING) $(WAITING) $(SEALED) $(SMOKE_OPT) $(call option,WITH,with) $(PAGE)

doctor: $(VENV)/.base ## Find out what stands in the way of weights
	@$(INV) doctor $(WHAT) $(FROM) $(GOING) $(SMOKE_OPT)

status: $(VENV)/.base ## Show what is here, what is missing, and what would be done
	@$(INV) status $(WHAT) $(FROM) $(GOING)

fetch: $(VENV)/.base ## Join or download the files into output/, and verify them
	@$(INV) fetch $(WHAT) $(FROM) $(GOING) $(WAITING) $(SEALED)

place: $(VENV)/.base ## Install verified files: move them from output/
	@$(INV) place $(WHAT) $(AT) $(SEALED)

verify: $(VENV)/.base ## Hash the installed files again and run all gates
	@$(INV) verify $(WHAT) $(PAGE)

attest: $(VENV)/.attest ## Write where the files come from (KEY=file signs it)
	@$(INV) attest $(WHAT) $(call option,KEY,key) $(call option,NEW_KEY,new-key)

smoke: $(VENV)/.smoke ## Load the installed model and run the smoke test
	@$(INV) smoke $(WHAT) $(PAGE)

seed-cache: $(VENV)/.base ## Link the installed files into the Hub's cache
	@$(INV) seed-cache $(WHAT)

compare: $(VENV)/.base ## Check that two formats, or FILE='A B', are equal
	@$(INV) compare --model $(call quoted,$(MODEL)) $(call option,DEST,dest) $(AT) \
		$(foreach file,$(FILE),--file $(call quoted,$(file)))

identify: $(VENV)/.base ## Tell what weights FILE=... are, and of which release
	@# With = a value that begins with a dash is no option.
	@$(INV) identify --path=$(call quoted,$(FILE))

convert: $(VENV)/.base ## Convert FILE=... to TO=original or transformers in OUT=...
	@$(INV) convert --path=$(call quoted,$(FILE)) --to=$(call quoted,$(TO)) --out=$(call quoted,$(OUT))

speak: $(VENV)/.speak ## Speak TEXT='...' to OUT=hi.wav (SEED=1, MAX_SECONDS=10)
	@$(INV) speak --text=$(call quoted,$(TEXT)) --out=$(call quoted,$(OUT)) --model $(call quoted,$(MODEL)) \
		$(call option,DEST,dest) $(AT) $(call option,SEED,seed) $(call option,MAX_SECONDS,max-seconds)

report: $(VENV)/.base ## Write a page about the installed files, OUT=page.html
	@$(INV) report --html=$(call quoted,$(OUT)) $(WHAT)

fleet: $(VENV)/.fleet ## Bring MODEL to all nodes of a Ray cluster (DIR, NODES)
	@$(INV) fleet --model $(call quoted,$(MODEL)) $(call option,ONLY,only) $(call option,SOURCE,source) \
		$(foreach url,$(URL),--url $(call quoted,$(url))) $(call option,REVISION,revision) $(WAITING) \
		$(call option,ADDRESS,address) $(call option,DIR,dir) $(call option,NODES,nodes) $(PAGE)

clean: $(VENV)/.base ## Remove unfinished files of MODEL
	@$(INV) clean --model $(call quoted,$(MODEL)) $(call option,DEST,dest) $(AT)

split: $(VENV)/.base ## Split FILE=... into chunk files, with digests
	@$(INV) split --file=$(call quoted,$(FILE))

lock: $(VENV)/.base ## Add digests of verified files to MODEL's manifest
	@$(INV) lock --model $(call quoted,$(MODEL))

standin: $(VENV)/.base ## Write a full-size stand-in of CSM-1B (needs 25 GB of disk)
	@$(INV) standin

test: $(VENV)/.test ## Run the tests
	@$(VENV)/bin/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.test ## Check style, types, layers of imports, scripts, workflows
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/shellcheck recombine.sh .ci/run
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-actions action.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

damage: $(VENV)/.test ## Damage weights in 300 ways: each must be named by tensor
	@DAMAGES=300 $(VENV)/bin/python -m pytest -q tests/formats/test_damage.py

test-full: $(VENV)/.test ## Run the tests that need root, 45 GB of disk, or minutes
	@$(VENV)/bin/python -m pytest -m full tests

test-integration: $(VENV)/.test ## Run the tests against nginx, Chromium, other releases
	@$(VENV)/bin/python -m pytest -m integration tests

test-torch: $(VENV)/.test ## Run the model's tests with the newest torch of its range
	@$(PYTHON) -m venv $(VENV)/torch
	@grep -v '^torch==' constraints.txt > $(VENV)/torch/constraints.txt
	@echo "installing the newest torch, 3 GB or more ..." >&2
	@$(VENV)/torch/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint $(VENV)/torch/constraints.txt --editable '.[torch,test]' >&2
	@$(VENV)/torch/bin/python -m pytest tests/model tests/test_api.py tests/commands/test_speak.py

test-fleet: $(VENV)/.fleet ## Run the tests of many machines, on Ray on this one
	@$(VENV)/bin/python -m pytest -m fleet tests

test-gpu: $(VENV)/.test ## Run the tests that need an NVIDIA GPU
	@$(VENV)/bin/python -m pytest -m gpu tests

test-kernels: $(VENV)/.kernels ## Run the tests of the fused kernels, without a GPU
	@TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n auto tests/model/test_kernels.py

messages: $(VENV)/.test ## Write docs/messages.md anew: every message of the package
	@UPDATE_GOLDEN=1 $(VENV)/bin/python -m pytest -q tests/commands/test_messages.py

torture: $(VENV)/.test ## Kill and race every command (SEED=1 MINUTES=10)
	@$(VENV)/bin/python -m tools.torture $(call option,SEED,seed) $(call option,MINUTES,minutes)

torture-room: $(VENV)/.test ## Kill weights --consume 20 times on an almost full disk (root)
	@$(VENV)/bin/python -m tools.torture.room $(call option,SEED,seed)

fuzz: $(VENV)/.fuzz ## Fuzz the readers of files, FUZZ_SECONDS=300 each
	@set -e; for target in manifest safetensors checkpoint; do \
		$(VENV)/bin/python -m tools.fuzz $$target $(VENV)/corpus \
			-max_total_time=$(call quoted,$(FUZZ_SECONDS)) -print_final_stats=1; \
	done

mutation: $(VENV)/.mutation ## Change the code and list what no test notices (SEED=1)
	@$(VENV)/bin/python -m tools.mutation $(call option,SEED,seed)

scanners: $(VENV)/.test ## Write docs/security-table.md: hostile files, scanners
	@$(VENV)/bin/python -m benchmarks.scanners

bench: $(VENV)/.base ## Measure against cat and sha256sum (needs 40 GB of disk)
	@$(VENV)/bin/python -m benchmarks.line

bench-download: $(VENV)/.test ## Measure downloads against hf, curl, aria2c (25 GB, nginx)
	@$(VENV)/bin/python -m benchmarks.download --full

bench-gpu: ## Measure loading and speaking on a GPU (7 GB of disk)
	@$(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3) -m benchmarks.gpu

bench-load: $(VENV)/.test ## Measure loading on the CPU (38 GB of disk)
	@$(VENV)/bin/python -m benchmarks.load

bench-ci: $(VENV)/.test ## Count what 200 CI jobs ask of the Hub, and hf download beside
	@$(VENV)/bin/python -m benchmarks.ci

bench-fleet: $(VENV)/.fleet ## Measure a fleet in network namespaces (root)
	@$(VENV)/bin/python -m benchmarks.fleet

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11; say make PYTHON=python3.11" >&2; exit 1; }
	@echo "setting up $(VENV), which takes some seconds ..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --quiet --editable .
	@touch $@

$(VENV)/.attest: $(VENV)/.base
	@echo "installing what signing needs ..." >&2
	@$(PIP) --quiet --editable '.[attest]'
	@touch $@

$(VENV)/.smoke: $(VENV)/.base
	@echo "installing torch, 0.2 to 3 GB; SMOKE=0 does without ..." >&2
	@$(PIP) --editable '.[torch]' >&2
	@touch $@

$(VENV)/.speak: $(VENV)/.base
	@echo "installing torch, transformers and tokenizers, 0.3 to 3 GB ..." >&2
	@$(PIP) --editable '.[speak]' >&2
	@touch $@

$(VENV)/.test: $(VENV)/.smoke
	@echo "installing what the tests need ..." >&2
	@$(PIP) --editable '.[torch,test]' >&2
	@touch $@

$(VENV)/.fuzz $(VENV)/.mutation $(VENV)/.kernels: $(VENV)/.%: $(VENV)/.test

$(VENV)/.fuzz $(VENV)/.mutation $(VENV)/.fleet: $(VENV)/.%: $(VENV)/.test
	@echo "installing what $* needs ..." >&2
	@$(PIP) --quiet --editable '.[$*]'
	@touch $@
