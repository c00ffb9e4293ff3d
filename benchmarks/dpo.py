"""A step of DPO on pairs with large images: with the prompt shared, with images encoded once, and the plain way.

    python -m benchmarks.dpo [--preset mini] [--repetitions 5] [--pairs 3] [--side 448]

plain: TRL's DPOTrainer, a row for each side, each image encoded for each row and each model; apart: this toolkit's, of
which each image is encoded once; shared: with `dpo.shared_prompt`, one row for both sides. All have the same model,
with this toolkit's adapter on attention and both pools, and the same pairs, their policy moved a little from its
reference. A step is the forwards of policy and reference and the backward. First, losses and every gradient are proved
equal.
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
    Questions,
    arms_of,
    asked_for,
    demand_equal,
    forget_peak,
    interleave,
    keep,
    machine,
    median,
    peak_memory,
    ratio,
    settings_of,
    table,
)

ARMS = ("plain", "apart", "shared")
TOLERANCE = 1e-5
_WORDS = 12  # of an answer


def write_pairs(folder: Path, given: argparse.Namespace) -> Path:
    """Pairs with one large image each, answers of a dozen words."""
    import random

    import numpy as np
    from PIL import Image

    from ernie_align.tiny.tokenizer import NUMBERS

    draw, noise = random.Random(0), np.random.default_rng(0)
    rows = []
    for number in range(given.pairs * 3):
        image = folder / f"{number}.png"
        coarse = noise.integers(0, 256, (given.side // 14, given.side // 14, 3), dtype=np.uint8)
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


def recipe(arm: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The same for every arm but for how a prompt is laid out."""
    return {
        "stage": "dpo",
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "adapter": {"scopes": ["attention", "text_experts", "vision_experts"], "rank": 8, "alpha": 16},
        "data": {"train": [{"path": str(folder / "pairs.jsonl")}], "max_length": 4096},
        "dpo": {"shared_prompt": arm == "shared"},
        "training": {
            "max_steps": 1,
            "per_device_train_batch_size": given.pairs,
            "gradient_checkpointing": given.checkpointing,
            "report_to": "none",
        },
        "run": {"dir": str(folder / arm)},
    }


def trainer_of(arm: str, folder: Path, given: argparse.Namespace) -> Any:
    """An arm's trainer, its policy moved a little from its reference."""
    import torch
    from transformers import set_seed

    from ernie_align.models.load import load_model
    from ernie_align.runs import load_recipe
    from ernie_align.runs.prepare import prepare_data, set_up

    setup = set_up(load_recipe(recipe(arm, folder, given)))
    data = prepare_data(setup)
    bundle = load_model(setup.recipe.model.name, dtype="float32")
    for parameter in bundle.model.parameters():  # out of the file's pages, which the system takes back when it likes
        parameter.data = parameter.data.clone()
    set_seed(0)
    setup.stage.prepare_model(setup.recipe, bundle)
    config = setup.stage.configure(setup.recipe, str(folder / arm))
    if arm == "plain":
        trainer = trls_own(bundle, config, data.train)
    else:
        trainer = setup.stage.build_trainer(setup.recipe, config, bundle, data, [])
    trainer.model.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    return trainer


def trls_own(bundle: Any, config: Any, rows: Any) -> Any:
    """TRL's DPOTrainer on our model and our encoded rows, against the model without its adapter."""
    import torch
    from trl import DPOTrainer

    from ernie_align.data.pairs import PairCollator

    class Encoded(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    collate = PairCollator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)

    def as_trl_has_it(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: value for key, value in collate(examples).items() if key not in ("rows", "vision_tokens")}
        return batch | {key: torch.cat([batch[key]] * 2) for key in ("pixel_values", "image_grid_thw")}

    trainer = Encoded(
        model=bundle.model,
        args=config,
        data_collator=as_trl_has_it,
        train_dataset=rows,
        processing_class=bundle.processor,
    )
    trainer.model.delete_adapter("ref")  # a copy of the adapter, which is worth nothing yet: without it is the same
    return trainer


def work(arm: str, folder: Path, given: argparse.Namespace) -> None:
    """Be one arm."""
    import torch
    from safetensors.torch import save_file

    from ernie_align.report.console import quiet_libraries

    quiet_libraries()
    questions = Questions()
    trainer = trainer_of(arm, folder, given)
    rows, done = list(trainer.train_dataset), 0
    forget_peak()
    held = peak_memory()

    def step() -> dict[str, float]:
        nonlocal done
        start = done * given.pairs
        batch = trainer.data_collator([rows[(start + place) % len(rows)] for place in range(given.pairs)])
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        loss.backward()
        done += 1
        return {"loss": loss.item()}

    def first_step() -> dict[str, float]:
        """One more than is timed, for the gradients."""
        values = step()
        named = trainer.model.named_parameters()
        gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        save_file(gradients, folder / f"{arm}.safetensors")
        return values

    if questions.wait():
        questions.answer(**first_step())
    torch.manual_seed(0)

    values: dict[str, float] = {}

    def timed() -> None:
        values.update(step())

    questions.serve(timed, lambda: {**values, "held": held})


def demand_equal_gradients(folder: Path, arm: str) -> float:
    """Every gradient of an arm is the plain way's, against the greatest of its tensor; the worst is returned."""
    from safetensors.torch import load_file

    plain, found = load_file(folder / "plain.safetensors"), load_file(folder / f"{arm}.safetensors")
    if plain.keys() != found.keys():
        sys.exit(f"{arm}: gradients of {sorted(plain.keys() ^ found.keys())[:3]} are in one of both")
    worst = max(float((found[name] - plain[name]).abs().max() / plain[name].abs().max()) for name in plain)
    if not worst <= TOLERANCE:
        sys.exit(f"{arm}: a gradient is off by {worst:.1e}: these are not the same")
    return worst


def main() -> None:
    """Make model and pairs, prove the arms equal, ask them in turn, and print the table."""
    numbers = {"pairs": (3, "pairs of a step"), "side": (448, "pixels of an image's side, in steps of 28")}
    given = asked_for(__doc__, ARMS, repetitions=(5, None), **numbers)
    if given.arm:
        work(given.arm, given.folder, given)
        return
    from ernie_align.runs import load_recipe
    from ernie_align.runs.prepare import prepare_data, set_up
    from ernie_align.tiny import make_checkpoint

    # freed memory goes back at once, so that a peak is what was in use
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint("vl_moe", folder / "model", preset=given.preset)
        write_pairs(folder, given)
        setup = set_up(load_recipe(recipe("shared", folder, given)))
        rows = list(prepare_data(setup).train)
        arms = arms_of("benchmarks.dpo", ARMS, given, folder)
        firsts = {arm.name: [arm.step()] for arm in arms}
        worst = {}
        for arm in ARMS[1:]:
            demand_equal(firsts[arm], firsts["plain"], {"loss": TOLERANCE})
            worst[arm] = demand_equal_gradients(folder, arm)
        steps = interleave(arms, given.repetitions)
    for arm in ARMS[1:]:
        demand_equal(steps[arm], steps["plain"], {"loss": TOLERANCE})

    prompt, answer = (statistics.mean(len(row[f"{part}_ids"]) for row in rows) for part in ("prompt", "rejected"))
    tokens = given.pairs * statistics.mean(
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
        f"{given.preset}, {given.pairs} pairs a step, prompts of {prompt:.0f} tokens and answers of {answer:.0f}, "
        f"float32, checkpointing {given.checkpointing}"
    )
    print(f"{machine()}; gradients equal to {max(worst.values()):.0e}\n")
    columns = (
        ("s a step", "seconds", ".2f"),
        ("plain's time over it", "plain_seconds_over_it"),
        ("useful tokens/s", "tokens_per_second", ".0f"),
        ("peak GB", "peak_bytes", ".2f", 1e9),
        ("plain's over it", "plain_peak_over_it"),
        ("less the loaded model", "over_loaded_bytes", ".2f", 1e9),
        ("plain's over it", "plain_over_over_it"),
    )
    print(table(figures, *columns))
    name = "dpo" + ("" if given.preset == "mini" else f"-{given.preset}") + ("-checkpointing" * given.checkpointing)
    keep(name, {**settings_of(given), "prompt": prompt, "answer": answer, "gradients_off": worst, "arms": figures})


if __name__ == "__main__":
    main()
