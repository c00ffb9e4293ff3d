"""Compare a step of `lora` on packed rows with the same step on padded rows, images included.

    python -m benchmarks.packing [--preset mini] [--repetitions 5] [--rows 8] [--capacity 1024]

packed: packs of rows with attention computed per document; block_mask: the same packs with transformers' block mask;
padded: batches of rows in the order they were drawn. The step of every arm holds the same documents, in two accumulated
batches. Lengths are log-uniform over a range of 1:10; every second row has an image that takes about half of its
tokens. Useful tokens are the tokens of the documents.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import (
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

ARMS = ("packed", "block_mask", "padded")
BATCHES = 2  # per step
WARM_UP = 1
_SHORTEST, _OVERHEAD = 30, 24  # tokens of the shortest row, and of the chat template around its text
_TOKEN_SIDE = 28  # pixels per token along a side of an image


def make_rows(folder: Path, count: int) -> None:
    """Write rows.jsonl and its images."""
    import numpy as np
    from PIL import Image

    draw, noise = random.Random(0), np.random.default_rng(0)
    lines = []
    for number in range(count):
        length, images = int(_SHORTEST * 10 ** draw.random()), []
        text = length - _OVERHEAD
        if number % 2:
            side = max(2, round((length / 2) ** 0.5))
            pixels = noise.integers(0, 256, (side * _TOKEN_SIDE, side * _TOKEN_SIDE, 3), dtype=np.uint8)
            images = [f"{number}.png"]
            Image.fromarray(pixels).save(folder / images[0])
            text -= side * side
        answer = " ".join(draw.choice(["one", "two", "three", "plus"]) for _ in range(max(2, text)))
        messages = [{"role": "user", "content": "Which digit is this?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "images": images}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))


def make_batches(lengths: list[int], options: argparse.Namespace, steps: int) -> dict[str, list[list[int]]]:
    """Return the rows of each batch, BATCHES per step, for the packed and the padded arms.

    The rows of a step are redrawn until they fill as many packs as the step has batches.
    """
    from ernie_align.data.packing import best_fit_decreasing

    draw, found = random.Random(0), {"packed": [], "padded": []}
    while len(found["padded"]) < BATCHES * steps:
        rows = draw.sample(range(len(lengths)), BATCHES * options.rows)
        packs = best_fit_decreasing([lengths[row] for row in rows], options.capacity, seed=0)
        if len(packs) == BATCHES:
            found["packed"] += [[rows[place] for place in members] for members in packs]
            found["padded"] += [rows[start : start + options.rows] for start in range(0, len(rows), options.rows)]
    return found


def recipe(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe that all arms take model, rows and settings from."""
    return {
        "stage": "lora",
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "adapter": {"scopes": ["attention", "text_experts", "vision_experts"], "rank": 8, "alpha": 16},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": options.capacity},
        "training": {
            "max_steps": WARM_UP + options.repetitions + 1,  # the last step is never requested; the process ends
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": BATCHES,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": options.checkpointing,
            "learning_rate": 1e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        },
        "run": {"dir": str(folder / "run")},
    }


def work(arm: str, folder: Path, options: argparse.Namespace) -> None:
    """Run one arm in this process."""
    from datasets import Dataset
    from transformers import set_seed

    from benchmarks.sft import make_gate
    from ernie_align.data.collate import Collator, PaddingFreeCollator
    from ernie_align.models.load import load_model
    from ernie_align.models.packed_attention import use_per_document_attention
    from ernie_align.report.console import quiet_libraries
    from ernie_align.runs import load_recipe, prepare_data, set_up
    from ernie_align.stages.sft_trainer import SupervisedTrainer

    gate_callback = make_gate()
    quiet_libraries()
    setup = set_up(load_recipe(recipe(folder, options)))
    data = prepare_data(setup)
    bundle = load_model(setup.recipe.model.name, dtype="float32")
    set_seed(0)
    setup.stage.prepare_model(setup.recipe, bundle)
    pad = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)

    def padded(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return pad([data.train[number] for example in examples for number in example["members"]])

    if arm == "packed":
        use_per_document_attention(bundle.model)
    flat = PaddingFreeCollator(data.train, image_processor=bundle.image_processor)
    batches = json.loads((folder / "batches.json").read_text())["padded" if arm == "padded" else "packed"]
    SupervisedTrainer(
        model=bundle.model,
        args=setup.stage.configure(setup.recipe, setup.recipe.run.dir),
        data_collator=padded if arm == "padded" else flat,
        train_dataset=Dataset.from_dict({"members": batches}),
        processing_class=bundle.processor,
        callbacks=[gate_callback],
        row_name=data.row_name,
    ).train()


def main() -> None:
    """Create model, rows and batches, measure the arms, check that they are equal, and print the table."""
    numbers = {"rows": (8, "rows per padded batch"), "capacity": (1024, "tokens per pack")}
    options = parse_options(__doc__, ARMS, repetitions=(5, None), **numbers)
    if options.arm:
        work(options.arm, options.folder, options)
        return
    from ernie_align.runs import load_recipe, prepare_data, set_up
    from ernie_align.tiny import make_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint("vl_moe", folder / "model", preset=options.preset)
        make_rows(folder, 400)
        rows = prepare_data(set_up(load_recipe(recipe(folder, options)))).train
        lengths, vision = rows["length"][:], sum(rows["vision_tokens"][:])
        batches = make_batches(lengths, options, WARM_UP + options.repetitions + 1)
        (folder / "batches.json").write_text(json.dumps(batches))
        steps = interleave(
            start_arms("benchmarks.packing", ARMS, options, folder), options.repetitions, warm_up=WARM_UP
        )
    for arm in ("packed", "block_mask"):
        # float32 sums in another order over two batches; with Adam, rounding shows from the second step on
        check_equal(steps[arm], steps["padded"], {"loss": 1e-4, "grad_norm": 1e-3})

    measured = batches["padded"][BATCHES * WARM_UP :][: BATCHES * options.repetitions]
    useful_tokens = [sum(lengths[row] for row in batch) for batch in measured]
    padded_tokens = [len(batch) * max(lengths[row] for row in batch) for batch in measured]
    tokens = BATCHES * sum(useful_tokens) / len(useful_tokens)
    figures = {
        arm: {
            "seconds": median(steps[arm], "seconds"),
            "padded_over_it": ratio(steps["padded"], steps[arm]),
            "useful_tokens_per_second": tokens / median(steps[arm], "seconds"),
            "peak_bytes": max(step["peak"] for step in steps[arm]),
        }
        for arm in ARMS
    }
    facts = {
        "shortest": min(lengths),
        "longest": max(lengths),
        "vision_share": vision / sum(lengths),
        "useful_tokens_per_step": tokens,
        "padding": 1 - sum(useful_tokens) / sum(padded_tokens),
    }
    print(f"{options.preset}, {machine()}, float32, checkpointing {options.checkpointing}")
    print(
        f"rows of {facts['shortest']} to {facts['longest']} tokens, {facts['vision_share']:.0%} of them vision; "
        f"{tokens:.0f} useful tokens per step; {facts['padding']:.1%} padding in batches of {options.rows} rows\n"
    )
    columns = (
        ("s/step", "seconds", ".2f"),
        ("padded time / this", "padded_over_it"),
        ("useful tokens/s", "useful_tokens_per_second", ".0f"),
        ("peak GB", "peak_bytes", ".2f", 1e9),
    )
    print(table(figures, *columns))
    name = "packing" if options.preset == "mini" else f"packing-{options.preset}"
    keep(name, {**settings_from(options), **facts, "arms": figures})


if __name__ == "__main__":
    main()
