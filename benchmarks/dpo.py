"""Measure a DPO step on pairs with large images: shared prompts, images encoded once, and TRL's own trainer.

    python -m benchmarks.dpo [--preset mini] [--repetitions 5] [--pairs 3] [--side 448]

plain: TRL's DPOTrainer, one row per side, each image encoded per row and model; apart: this toolkit's trainer, which
encodes each image once; shared: with `dpo.shared_prompt`, one row for both sides. All arms have the same pairs
and the same model with this toolkit's adapter on attention and both pools; the policy is moved slightly away from its
reference. A step is the forward passes of policy and reference and the backward pass. Losses and all gradients are
checked for equality first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    StepServer,
    check_equal,
    interleave,
    keep,
    machine,
    median,
    parse_options,
    peak_memory,
    ratio,
    reset_peak_memory,
    settings_from,
    start_arms,
    table,
)

ARMS = ("plain", "apart", "shared")
TOLERANCE = 1e-5
_WORDS = 12  # per answer


def write_pairs(folder: Path, options: argparse.Namespace) -> Path:
    """Write pairs with one large image each and answers of a dozen words."""
    import random

    import numpy as np
    from PIL import Image

    from ernie_align.tiny.tokenizer import NUMBERS

    draw, noise = random.Random(0), np.random.default_rng(0)
    rows = []
    for number in range(options.pairs * 3):
        image = folder / f"{number}.png"
        coarse = noise.integers(0, 256, (options.side // 14, options.side // 14, 3), dtype=np.uint8)
        Image.fromarray(np.kron(coarse, np.ones((14, 14, 1), dtype=np.uint8))).save(image)
        sides = {
            side: [{"role": "assistant", "content": " ".join(draw.choices(NUMBERS, k=_WORDS + more))}]
            for side, more in (("chosen", 0), ("rejected", 2))
        }
        content = [{"type": "image"}, {"type": "text", "text": "What is larger?"}]
        rows.append({"prompt": [{"role": "user", "content": content}], **sides, "images": [str(image)]})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of an arm; arms differ only in `shared_prompt`."""
    return {
        "stage": "dpo",
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "adapter": {"scopes": ["attention", "text_experts", "vision_experts"], "rank": 8, "alpha": 16},
        "data": {"train": [{"path": str(folder / "pairs.jsonl")}], "max_length": 4096},
        "dpo": {"shared_prompt": arm == "shared"},
        "training": {
            "max_steps": 1,
            "per_device_train_batch_size": options.pairs,
            "gradient_checkpointing": options.checkpointing,
            "report_to": "none",
        },
        "run": {"dir": str(folder / arm)},
    }


def build_trainer(arm: str, folder: Path, options: argparse.Namespace) -> Any:
    """Build the trainer of an arm, with the policy moved slightly away from its reference."""
    import torch
    from transformers import set_seed

    from ernie_align.models.load import load_model
    from ernie_align.runs import load_recipe
    from ernie_align.runs.prepare import prepare_data, set_up

    setup = set_up(load_recipe(recipe(arm, folder, options)))
    data = prepare_data(setup)
    bundle = load_model(setup.recipe.model.name, dtype="float32")
    for parameter in bundle.model.parameters():  # not backed by the file, whose pages the system may drop
        parameter.data = parameter.data.clone()
    set_seed(0)
    setup.stage.prepare_model(setup.recipe, bundle)
    config = setup.stage.configure(setup.recipe, str(folder / arm))
    if arm == "plain":
        trainer = build_trl_trainer(bundle, config, data.train)
    else:
        trainer = setup.stage.build_trainer(setup.recipe, config, bundle, data, [])
    trainer.model.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    return trainer


def build_trl_trainer(bundle: Any, config: Any, rows: Any) -> Any:
    """Build TRL's DPOTrainer on our model and encoded rows; the reference is the model without its adapter."""
    import torch
    from trl import DPOTrainer

    from ernie_align.data.pairs import PairCollator

    class Encoded(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    collate = PairCollator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)

    def collate_for_trl(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: value for key, value in collate(examples).items() if key not in ("rows", "vision_tokens")}
        return batch | {key: torch.cat([batch[key]] * 2) for key in ("pixel_values", "image_grid_thw")}

    trainer = Encoded(
        model=bundle.model,
        args=config,
        data_collator=collate_for_trl,
        train_dataset=rows,
        processing_class=bundle.processor,
    )
    trainer.model.delete_adapter("ref")  # a copy of the untrained adapter: the base model is the same reference
    return trainer


def work(arm: str, folder: Path, options: argparse.Namespace) -> None:
    """Run one arm in this process."""
    import torch
    from safetensors.torch import save_file

    from ernie_align.report.console import quiet_libraries

    quiet_libraries()
    server = StepServer()
    trainer = build_trainer(arm, folder, options)
    rows, done = list(trainer.train_dataset), 0
    reset_peak_memory()
    held = peak_memory()

    def step() -> dict[str, float]:
        nonlocal done
        start = done * options.pairs
        batch = trainer.data_collator([rows[(start + place) % len(rows)] for place in range(options.pairs)])
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        loss.backward()
        done += 1
        return {"loss": loss.item()}

    def first_step() -> dict[str, float]:
        """Run an untimed step and save its gradients."""
        values = step()
        named = trainer.model.named_parameters()
        gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        save_file(gradients, folder / f"{arm}.safetensors")
        return values

    if server.wait():
        server.answer(**first_step())
    torch.manual_seed(0)

    values: dict[str, float] = {}

    def timed() -> None:
        values.update(step())

    server.serve(timed, lambda: {**values, "held": held})


def check_equal_gradients(folder: Path, arm: str) -> float:
    """Exit unless all gradients equal those of plain; return the largest relative difference."""
    from safetensors.torch import load_file

    plain, found = load_file(folder / "plain.safetensors"), load_file(folder / f"{arm}.safetensors")
    if plain.keys() != found.keys():
        sys.exit(f"{arm}: only one arm has gradients of {sorted(plain.keys() ^ found.keys())[:3]}")
    worst = max(float((found[name] - plain[name]).abs().max() / plain[name].abs().max()) for name in plain)
    if not worst <= TOLERANCE:
        sys.exit(f"{arm}: a gradient differs by {worst:.1e}")
    return worst


def main() -> None:
    """Create model and pairs, check that the arms are equal, measure them, and print the table."""
    numbers = {"pairs": (3, "pairs per step"), "side": (448, "side of the images in pixels, a multiple of 28")}
    options = parse_options(__doc__, ARMS, repetitions=(5, None), **numbers)
    if options.arm:
        work(options.arm, options.folder, options)
        return
    from ernie_align.runs import load_recipe
    from ernie_align.runs.prepare import prepare_data, set_up
    from ernie_align.tiny import make_checkpoint

    # return freed memory at once, so that the peak is the memory in use
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint("vl_moe", folder / "model", preset=options.preset)
        write_pairs(folder, options)
        setup = set_up(load_recipe(recipe("shared", folder, options)))
        rows = list(prepare_data(setup).train)
        arms = start_arms("benchmarks.dpo", ARMS, options, folder)
        firsts = {arm.name: [arm.step()] for arm in arms}
        worst = {}
        for arm in ARMS[1:]:
            check_equal(firsts[arm], firsts["plain"], {"loss": TOLERANCE})
            worst[arm] = check_equal_gradients(folder, arm)
        steps = interleave(arms, options.repetitions)
    for arm in ARMS[1:]:
        check_equal(steps[arm], steps["plain"], {"loss": TOLERANCE})

    prompt, answer = (statistics.mean(len(row[f"{part}_ids"]) for row in rows) for part in ("prompt", "rejected"))
    tokens = options.pairs * statistics.mean(
        sum(len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in rows
    )
    for done in steps.values():
        for step in done:
            step["over"] = step["peak"] - step["held"]
    figures = {
        arm: {
            "seconds": median(done, "seconds"),
            "tokens_per_second": tokens / median(done, "seconds"),
            "peak_bytes": max(step["peak"] for step in done),
            "over_loaded_bytes": max(step["over"] for step in done),
            **{f"plain_{key}_over_it": ratio(steps["plain"], done, key) for key in ("seconds", "peak", "over")},
        }
        for arm, done in steps.items()
    }
    print(
        f"{options.preset}, {options.pairs} pairs per step, prompt {prompt:.0f} tokens, answer {answer:.0f} tokens, "
        f"float32, checkpointing {options.checkpointing}"
    )
    print(f"{machine()}; gradients equal to {max(worst.values()):.0e}\n")
    columns = (
        ("s/step", "seconds", ".2f"),
        ("plain time / this", "plain_seconds_over_it"),
        ("useful tokens/s", "tokens_per_second", ".0f"),
        ("peak GB", "peak_bytes", ".2f", 1e9),
        ("plain peak / this", "plain_peak_over_it"),
        ("minus loaded model, GB", "over_loaded_bytes", ".2f", 1e9),
        ("plain / this", "plain_over_over_it"),
    )
    print(table(figures, *columns))
    name = (
        "dpo" + ("" if options.preset == "mini" else f"-{options.preset}") + ("-checkpointing" * options.checkpointing)
    )
    keep(name, {**settings_from(options), "prompt": prompt, "answer": answer, "gradients_off": worst, "arms": figures})


if __name__ == "__main__":
    main()
