"""A whole step of the stage `lora` against the same step of the stock stack, on the same model, rows and seed.

    python -m benchmarks.sft [--preset mini] [--repetitions 7] [--batch 20]

ours: this toolkit's run, LoRA on attention and both pools; attention: the same on attention alone; stock: transformers,
PEFT and TRL's SFTTrainer as they come, on the same encoded rows, with one thing mended so that it runs at all: the
routing tensor is derived at the backbone. A step is forward, backward and optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    Questions,
    Stopwatch,
    arms_of,
    asked_for,
    demand_equal,
    interleave,
    keep,
    machine,
    median,
    ratio,
    settings_of,
    table,
)

ARMS = ("ours", "stock", "attention")
WARM_UP = 2


def recipe(arm: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The same run for every arm, in all but its scopes."""
    pools = [] if arm == "attention" else ["text_experts", "vision_experts"]
    steps = WARM_UP + given.repetitions + 1  # the last one is never asked for, and its process ends
    return {
        "stage": "lora",
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "adapter": {"scopes": ["attention", *pools], "rank": 8, "alpha": 16},
        "data": {"train": [{"path": str(folder / "digits" / "train.jsonl"), "limit": given.batch * steps}]},
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": given.batch,
            "gradient_checkpointing": given.checkpointing,
            "learning_rate": 1e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        },
        "run": {"dir": str(folder / arm)},
    }


def gate() -> Any:
    """A callback that lets a trainer go step by step, whenever it is asked, and answers with what the step took."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def __init__(self):
            self.questions = Questions()

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.questions.wait():
                raise SystemExit
            self.watch = Stopwatch().__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            self.watch.__exit__()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                numbers = {key: float(logs[key]) for key in ("loss", "grad_norm")}
                self.questions.answer(seconds=self.watch.seconds, peak=self.watch.peak, **numbers)

    return Gate()


def work(arm: str, folder: Path, given: argparse.Namespace) -> None:
    """Be one arm."""
    from rich.console import Console

    from ernie_align.report.console import Terminal, quiet_libraries
    from ernie_align.runs import load_recipe, run

    asked = gate()

    class Gated(Terminal):
        def progress(self):
            return [asked]

    quiet_libraries()
    checked = load_recipe(recipe(arm, folder, given))
    if arm == "stock":
        train_with_the_stock_stack(checked, asked)
    else:
        run(checked, reporter=Gated(Console(quiet=True)))


def train_with_the_stock_stack(checked: Any, callback: Any) -> None:
    """transformers' model, PEFT's adapter, TRL's trainer; our rows, and our hook for the routing tensor."""
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
    model = get_peft_model(model, LoraConfig(**config.to_dict()))  # the settings alone: without our wrapper
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)

    def as_trl_has_it(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in collate(examples).items() if key not in ("rows", "vision_tokens")}

    SFTTrainer(
        model=model,
        args=setup.stage.configure(checked, checked.run.dir),
        data_collator=as_trl_has_it,
        train_dataset=prepare_data(setup).train,
        processing_class=bundle.processor,
        callbacks=[callback],
    ).train()


def main() -> None:
    """Make model and rows, ask the arms in turn, prove ours and the stock stack equal, and print the table."""
    given = asked_for(__doc__, ARMS, repetitions=(7, None), batch=(20, "rows of a step"))
    if given.arm:
        work(given.arm, given.folder, given)
        return
    from ernie_align.models.load import load_model
    from ernie_align.runs import load_recipe
    from ernie_align.runs.prepare import prepare_data, set_up
    from ernie_align.tiny import make_checkpoint, make_digits

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint("vl_moe", folder / "model", preset=given.preset)
        make_digits(folder / "digits")
        setup = set_up(load_recipe(recipe("ours", folder, given)))
        length = statistics.mean(len(row["input_ids"]) for row in prepare_data(setup).train)
        architecture = load_model(str(folder / "model")).architecture
        steps = interleave(arms_of("benchmarks.sft", ARMS, given, folder), given.repetitions, warm_up=WARM_UP)
    # Adam divides by the size of each gradient, so that from the second step on rounding in near-zero ones shows
    demand_equal(steps["ours"], steps["stock"], {"loss": 1e-4, "grad_norm": 1e-3})

    experts = 4 * sum(tensor.size for tensor in architecture.tensors if tensor.kind == "fused")
    tokens = given.batch * length
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
    print(
        f"{given.preset}, {given.batch} rows, {tokens:.0f} tokens a step, float32, checkpointing {given.checkpointing}"
    )
    print(f"{machine()}; routed experts {experts / 1e9:.2f} GB; stock's peak less ours: {saved:.2f} of them\n")
    columns = (
        ("s a step", "seconds", ".2f"),
        ("stock's time over it", "stock_over_it"),
        ("times attention alone", "times_attention"),
        ("tokens/s", "tokens_per_second", ".0f"),
        ("peak GB", "peak_bytes", ".2f", 1e9),
    )
    print(table(figures, *columns))
    name = f"sft-{given.preset}-{given.batch}" + ("-checkpointing" if given.checkpointing else "")
    keep(name, {**settings_of(given), "tokens_per_step": tokens, "saved_over_experts": saved, "arms": figures})


if __name__ == "__main__":
    main()
