# `make demo` and `make test` install everything they need into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
ALIGN := $(BIN)/ernie-align
CHECKPOINTS := runs/demo/tiny-vl runs/demo/digits-sft/final runs/demo/digits-lora/final runs/demo/digits-vision-lora/final

.PHONY: setup demo test test-fast test-examples lint clean-demo

setup: .venv/ready

# torch is installed first, so that no other package pulls in a CUDA build
.venv/ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# A tiny ERNIE-4.5-VL learns to read digits, then two LoRA adapters are trained, then all checkpoints are compared.
demo: setup clean-demo
	$(ALIGN) tiny vl_moe runs/demo/tiny-vl
	$(ALIGN) tiny digits runs/digits
	$(ALIGN) sft recipes/demo/digits_sft.yaml
	$(ALIGN) lora recipes/demo/digits_lora.yaml
	$(ALIGN) lora recipes/demo/digits_vision_lora.yaml
	$(ALIGN) eval $(CHECKPOINTS) --data runs/digits/test.jsonl --data runs/digits/parity_test.jsonl \
		--data runs/digits/inverted_test.jsonl --max-new-tokens 8 --out runs/demo/report.json

# removes what an earlier demo made, and nothing else under runs/
clean-demo:
	rm -rf runs/demo runs/digits

# one thread per worker, since more threads than cores slow each other down
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# without a model or a training run
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/unit

# the walkthroughs, from a clean kernel in a clean folder, one after the other
test-examples: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m examples tests/examples

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
