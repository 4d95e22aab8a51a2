# make demo: a real model answers a question about a long text on two sequence-parallel ranks of this machine.
# make serve: the same model behind an HTTP API on port 8000 (PORT=N), with a live page at /.
# make test: everything that CI runs. Both need Python 3.11 and make, and repeat nothing that is there already.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# More pip options for torch alone, such as those that choose CPU wheels.
TORCH_ARGS ?=
SPS2_CACHE ?= $(HOME)/.cache/megatron_sps2
export SPS2_CACHE

BIN := .venv/bin
MODEL := SmolLM2-135M-Instruct
GGUF := $(SPS2_CACHE)/$(MODEL).Q4_1.gguf
CHECKPOINT := $(SPS2_CACHE)/$(MODEL)
CONVERTED := $(CHECKPOINT)/latest_checkpointed_iteration.txt

PORT ?= 8000

# make bench: a Mooncake trace (github.com/kvcache-ai/Mooncake), a text that its prompts are cut from, where files go.
MOONCAKE ?= mooncake_conversation_trace.jsonl
TEXT ?= text.txt
RESULTS := benchmarks/evaluation
RANDOM_LLAMA := $(SPS2_CACHE)/random-llama-56M

.PHONY: help venv venv-test model demo serve lint test bench clean

help:
	@echo "make demo   set up, fetch SmolLM2, answer a question about a long text on 2 ranks"
	@echo "make serve  set up, fetch SmolLM2, serve it on 2 ranks: http://127.0.0.1:$(PORT)/"
	@echo "make test   set up, fetch SmolLM2, lint, types, import floors, tests"
	@echo "make bench  measure for about two hours and rewrite docs/evaluation.md: MOONCAKE=TRACE TEXT=FILE"
	@echo "make venv | venv-test | model | lint | clean"

venv: .venv/.installed
venv-test: .venv/.installed-test
model: $(CONVERTED)

# torch comes first and alone: chosen together with the others, pip may take a CUDA build of several gigabytes.
.venv/.installed: requirements.txt setup.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=...")'
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

.venv/.installed-test: .venv/.installed requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

$(GGUF): | .venv/.installed
	$(BIN)/python examples/fetch_smollm2.py "$(SPS2_CACHE)"

# convert writes a checkpoint whole or not at all; --force replaces one that an older version wrote.
$(CONVERTED): | $(GGUF)
	$(BIN)/sps2 convert "$(GGUF)" "$(CHECKPOINT)" --force

demo: venv model
	$(BIN)/sps2 generate --checkpoint "$(CHECKPOINT)" --sp 2 --chat --prompt-file examples/prompt.txt \
		--max-tokens 96 --temperature 0 --dtype float32 --report

serve: venv model
	$(BIN)/sps2 serve --checkpoint "$(CHECKPOINT)" --sp 2 --port $(PORT)

lint: venv-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests wait much of their time: three at a time are right for 2 cores. Those that only compute run alone.
test: venv-test model lint
	$(BIN)/python -m pytest -m "not busy" --numprocesses 3 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m busy

# Wants the machine for itself. Each part can be run alone; the last line makes the page of what is there.
bench: venv-test model
	mkdir -p $(RESULTS)
	if test -f "$(MOONCAKE)"; then $(BIN)/sps2 bench compare --checkpoint "$(CHECKPOINT)" --sp 2 --dtype bfloat16 \
		--trace "$(MOONCAKE)" --trace-format mooncake --num-requests 32 --length-scale 0.0625 --arrivals poisson --request-rate 0.8 --loads 4,2,1 --rounds 2 \
		--settings sps2-csa,sps2-exact,sarathi-512,sarathi-2048 --text "$(TEXT)" --kv-cache-gib 0.5 \
		--json $(RESULTS)/mooncake.json --html $(RESULTS)/mooncake.html; \
	else echo "the trace is left out: MOONCAKE=$(MOONCAKE) is not there"; fi
	rm -rf $(RANDOM_LLAMA) && $(BIN)/python -m benchmarks.random_checkpoint $(RANDOM_LLAMA)
	$(BIN)/sps2 bench compare --checkpoint $(RANDOM_LLAMA) --sp 2 --dtype bfloat16 --trace-format synthetic \
		--trace 0.7:128-1024:16-64,0.3:8192-24576:16-64 --num-requests 20 --request-rate 0.25 --rounds 2 --kv-cache-gib 1 \
		--max-model-len 25600 --settings sps2-csa,sps2-exact,sarathi-512,sarathi-2048 \
		--json $(RESULTS)/long_prompts.json --html $(RESULTS)/long_prompts.html
	$(BIN)/python -m benchmarks.peers.install
	$(BIN)/python -m benchmarks.peers.run --limit-s 90 --json $(RESULTS)/peers.json
	$(BIN)/python -m benchmarks.peers.run --peers sps2_exact sps2_csa vllm_chunked --lengths 32768 --decodes 0 --rounds 1 --limit-s 250 \
		--json $(RESULTS)/peers_32k.json
	$(BIN)/python -m benchmarks.simulator_error --json $(RESULTS)/simulator_error.json
	$(BIN)/python -m benchmarks.scaling --json $(RESULTS)/scaling.json --figures docs/figures
	$(BIN)/python -m benchmarks.simulated_clusters --figures docs/figures
	$(BIN)/python -m benchmarks.evaluation

clean:
	rm -rf .venv build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
