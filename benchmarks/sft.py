"""Compare a whole step of the stage `lora` with the same step of the stock stack: same model, rows and seed.

    python -m benchmarks.sft [--preset mini] [--repetitions 7] [--batch 20]

ours: this toolkit's run with LoRA on attention and both pools; attention: the same on attention only; stock: unmodified
transformers, PEFT and TRL's SFTTrainer on the same encoded rows. The stock stack cannot run without one fix: the token
types are derived at the backbone. A step is forward, backward and optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    StepServer,
    Stopwatch,
    check_equal,
    interleave,
    keep,
    machine,
    median,
    parse_options,
    ratio,
    settings_from,
    start_arms,
    table,
)

ARMS = ("ours", "stock", "attention")
WARM_UP = 2


def recipe(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of an arm; arms differ only in their scopes."""
    pools = [] if arm == "attention" else ["text_experts", "vision_experts"]
    steps = WARM_UP + options.repetitions + 1  # the last step is never requested; the process ends
    return {
        "stage": "lora",
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "adapter": {"scopes": ["attention", *pools], "rank": 8, "alpha": 16},
        "data": {"train": [{"path": str(folder / "digits" / "train.jsonl"), "limit": options.batch * steps}]},
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": options.batch,
            "gradient_checkpointing": options.checkpointing,
            "learning_rate": 1e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        },
        "run": {"dir": str(folder / arm)},
    }


def make_gate() -> Any:
    """Return a callback that runs a trainer step by step on request and replies with the measurements."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def __init__(self):
            self.server = StepServer()

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.server.wait():
                raise SystemExit
            self.watch = Stopwatch().__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            self.watch.__exit__()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                numbers = {key: float(logs[key]) for key in ("loss", "grad_norm")}
                self.server.answer(seconds=self.watch.seconds, peak=self.watch.peak, **numbers)

    return Gate()


def work(arm: str, folder: Path, options: argparse.Namespace) -> None:
    """Run one arm in this process."""
    from rich.console import Console

    from ernie_align.report.console import Terminal, quiet_libraries
    from ernie_align.runs import load_recipe, run

    gate_callback = make_gate()

    class Gated(Terminal):
        def progress(self):
            return [gate_callback]

    quiet_libraries()
    checked = load_recipe(recipe(arm, folder, options))
    if arm == "stock":
        train_stock_stack(checked, gate_callback)
    else:
        run(checked, reporter=Gated(Console(quiet=True)))


def train_stock_stack(checked: Any, callback: Any) -> None:
    """Train with transformers' model, PEFT's adapter and TRL's trainer, on our rows and with our routing hook."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Ernie4_5_VLMoeForConditionalGeneration, set_seed
    from trl import SFTTrainer

    from ernie_align.data.collate import Collator
    from ernie_align.models.adapters import lora_config
    from ernie_align.models.load import load_model
    from ernie_align.models.routing import install_routing
    from ernie_align.models.trainable_parts import adapter_targets
    from ernie_align.runs.prepare import prepare_data, set_up

    setup = set_up(checked)
    bundle = load_model(checked.model.name, dtype="float32")
    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(checked.model.name, dtype=torch.float32)
    bundle.model = None
    install_routing(model.model)
    model.requires_grad_(False)
    config = lora_config(adapter_targets(setup.architecture, checked.adapter), checked.adapter, setup.architecture)
    set_seed(checked.run.seed)
    model = get_peft_model(model, LoraConfig(**config.to_dict()))  # a plain config: without our wrapper
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)

    def collate_for_trl(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in collate(examples).items() if key not in ("rows", "vision_tokens")}

    SFTTrainer(
        model=model,
        args=setup.stage.configure(checked, checked.run.dir),
        data_collator=collate_for_trl,
        train_dataset=prepare_data(setup).train,
        processing_class=bundle.processor,
        callbacks=[callback],
    ).train()


def main() -> None:
    """Create model and rows, measure the arms, check that ours and stock are equal, and print the table."""
    options = parse_options(__doc__, ARMS, repetitions=(7, None), batch=(20, "rows per step"))
    if options.arm:
        work(options.arm, options.folder, options)
        return
    from ernie_align.models.load import load_model
    from ernie_align.runs import load_recipe
    from ernie_align.runs.prepare import prepare_data, set_up
    from ernie_align.tiny import make_checkpoint, make_digits

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint("vl_moe", folder / "model", preset=options.preset)
        make_digits(folder / "digits")
        setup = set_up(load_recipe(recipe("ours", folder, options)))
        length = statistics.mean(len(row["input_ids"]) for row in prepare_data(setup).train)
        architecture = load_model(str(folder / "model")).architecture
        steps = interleave(start_arms("benchmarks.sft", ARMS, options, folder), options.repetitions, warm_up=WARM_UP)
    # Adam divides by the magnitude of each gradient, so rounding of near-zero gradients shows from the second step on
    check_equal(steps["ours"], steps["stock"], {"loss": 1e-4, "grad_norm": 1e-3})

    experts = 4 * sum(tensor.size for tensor in architecture.tensors if tensor.kind == "fused")
    tokens = options.batch * length
    figures = {
        arm: {
            "seconds": median(steps[arm], "seconds"),
            "stock_over_it": ratio(steps["stock"], steps[arm]),
            "times_attention": ratio(steps[arm], steps["attention"]),
            "tokens_per_second": tokens / median(steps[arm], "seconds"),
            "peak_bytes": max(step["peak"] for step in steps[arm]),
        }
        for arm in ARMS
    }
    saved = (figures["stock"]["peak_bytes"] - figures["ours"]["peak_bytes"]) / experts
    print(f"{options.preset}, {options.batch} rows, {tokens:.0f} tokens per step, float32,", end=" ")
    print(f"checkpointing {options.checkpointing}")
    print(f"{machine()}; routed experts {experts / 1e9:.2f} GB; stock peak minus ours: {saved:.2f} of them\n")
    columns = (
        ("s/step", "seconds", ".2f"),
        ("stock time / this", "stock_over_it"),
        ("time / attention only", "times_attention"),
        ("tokens/s", "tokens_per_second", ".0f"),
        ("peak GB", "peak_bytes", ".2f", 1e9),
    )
    print(table(figures, *columns))
    name = f"sft-{options.preset}-{options.batch}" + ("-checkpointing" if options.checkpointing else "")
    keep(name, {**settings_from(options), "tokens_per_step": tokens, "saved_over_experts": saved, "arms": figures})


if __name__ == "__main__":
    main()
