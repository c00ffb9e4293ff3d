"""Recipes, rows and trainers of a few steps, and what a run left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FAMILIES = ("dense", "moe", "vl_moe")


ROOT = Path(__file__).resolve().parents[2]


BOTH_POOLS = {"scopes": ["attention", "text_experts", "vision_experts"], "rank": 4, "alpha": 8}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def beside(folder: Path, root: Path, images: list[str]) -> list[str]:
    """Copies of images below `folder`, under the same names: rows may not lead out of the folder of their file."""
    for image in images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes((root / image).read_bytes())
    return images


def recipe_of(stage: str, model: Path, train: Path, run_dir: Path, **blocks: Any) -> dict[str, Any]:
    """A recipe for a few steps on a tiny model in float32. Blocks are merged over it."""
    recipe: dict[str, Any] = {
        "stage": stage,
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": [{"path": str(train)}], "max_length": 256},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        },
        "run": {"dir": str(run_dir)},
    }
    if stage in ("lora", "dpo", "kto"):
        recipe["adapter"] = {"scopes": ["attention"], "rank": 4, "alpha": 8}
    for name, values in blocks.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    return recipe


def run_quietly(recipe: dict[str, Any], **kwargs: Any) -> Any:
    """Run a recipe without a word."""
    from rich.console import Console

    from ernie_align.report.console import Terminal
    from ernie_align.runs import load_recipe, run

    return run(load_recipe(recipe), reporter=Terminal(Console(quiet=True)), **kwargs)


def logged(run_dir: Path, key: str = "loss") -> list[float]:
    """A value of metrics.jsonl, step by step."""
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def relative_difference(values, expected):
    """Return the largest difference of two tensors, relative to the largest expected value: independent of scale."""
    return float((values - expected).abs().max() / expected.abs().max())


def tensors_of(folder: Path) -> dict[str, Any]:
    """All weights in a folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def batch_with_images(bundle: Any, digits: Path) -> dict[str, Any]:
    """Two images in one row, one in the next, none in the third; the shorter rows are padded."""
    from ernie_align.data.collate import Collator
    from ernie_align.data.formats import canonicalize
    from ernie_align.data.render import renderer_of

    renderer = renderer_of(bundle)
    rows = [
        {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "two"}], "images": images}
        for images in (["images/0001.png", "images/0002.png"], ["images/0003.png"], [])
    ]
    examples = [
        vars(renderer.examples(canonicalize(row, "messages", digits), max_length=256)[0]) | {"rows": [0, number]}
        for number, row in enumerate(rows)
    ]
    batch = Collator(0, image_processor=bundle.image_processor)(examples)
    return {key: value for key, value in batch.items() if key != "rows"}


def long_run(stage, checkpoints, family, rows, run_dir, **blocks):
    """Eight steps over six batches an epoch, saved every three: the resumed part crosses into the second epoch."""
    recipe = recipe_of(stage, checkpoints[family], rows, run_dir, **blocks)
    recipe["training"] |= {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    return recipe


def stopped_after(step, run_dir, copy):
    """Copy a run as if it was killed after a step: no final folder, no later checkpoint, but later metrics."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "final")
    for checkpoint in copy.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)


def assert_same_run(run_dir, expected):
    """Assert that two runs have logged the same losses and finished with the same weights, bit for bit."""
    import torch

    tensors, expected_tensors = tensors_of(run_dir / "final"), tensors_of(expected / "final")
    assert logged(run_dir) == logged(expected)
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensor, expected_tensors[name]) for name, tensor in tensors.items())


def preference(question, chosen, rejected):
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    return {"prompt": [{"role": "user", "content": question}], **answers}


def trainer_of(recipe, *, noise=0.02):
    """The trainer that a run of this recipe has, its policy moved away from its reference by some noise."""
    import torch

    from ernie_align.models.load import load_model
    from ernie_align.runs import load_recipe
    from ernie_align.runs.prepare import prepare_data, set_up

    setup = set_up(load_recipe(recipe))
    recipe = setup.recipe
    data = prepare_data(setup)
    block = recipe.model
    bundle = load_model(block.name, dtype=block.dtype, attention=block.attention)
    torch.manual_seed(0)
    setup.stage.prepare_model(recipe, bundle)
    config = setup.stage.configure(recipe, recipe.run.dir)
    trainer = setup.stage.build_trainer(recipe, config, bundle, data, [])
    trainer.model.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += noise * torch.randn_like(parameter)
    return trainer


def stir(model):
    """Adapters begin as no change at all; make them one."""
    import torch

    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
