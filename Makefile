# `make demo` and `make test` install everything they need into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
ALIGN := $(BIN)/ernie-align
RUNS := runs/demo/digits-sft runs/demo/digits-lora runs/demo/digits-vision-lora
PAGE := runs/demo/report.html

.PHONY: setup demo test test-fast test-examples lint clean-demo

setup: .venv/ready

# torch is installed first, so that no other package pulls in a CUDA build
.venv/ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# A tiny ERNIE-4.5-VL learns to read digits, then two LoRA adapters are trained on it. All are evaluated, each adapter
# against the model it was trained on, and the last line is the path of the report page.
demo: setup clean-demo
	$(ALIGN) tiny vl_moe runs/demo/tiny-vl
	$(ALIGN) tiny digits runs/digits
	$(ALIGN) sft recipes/demo/digits_sft.yaml
	$(ALIGN) lora recipes/demo/digits_lora.yaml
	$(ALIGN) lora recipes/demo/digits_vision_lora.yaml
	$(ALIGN) eval runs/demo/tiny-vl $(addsuffix /final,$(RUNS)) --data runs/digits/test.jsonl \
		--data runs/digits/parity_test.jsonl --data runs/digits/inverted_test.jsonl --max-new-tokens 8 \
		--out runs/demo/report.json
	$(ALIGN) report runs/demo/report.json $(RUNS) --out $(PAGE)
	@echo "$(CURDIR)/$(PAGE)"

# The demo starts from scratch each time; only its own folders under runs/ are removed.
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
