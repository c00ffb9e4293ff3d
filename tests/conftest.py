"""Tiny real checkpoints and real images, made once per test process, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ("dense", "moe", "vl_moe")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    from ernie_align.report.console import hush

    hush()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """family -> a tiny checkpoint. Its correction biases and routers are not zero, so that routing means something."""
    from ernie_align.tiny import make_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    from ernie_align.tiny import make_digits

    return make_digits(tmp_path_factory.mktemp("tiny") / "digits")


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def renderers(checkpoints) -> dict[str, Any]:
    """family -> its renderer."""
    from ernie_align.evaluation.generate import make_renderer
    from ernie_align.models.files import CheckpointFiles
    from ernie_align.models.modality import ModalityTokens
    from ernie_align.models.pixels import ImageSizes

    def renderer(path: Path) -> Any:
        files = CheckpointFiles(str(path))
        modality = ModalityTokens.from_config(files.read_json("config.json"))
        return make_renderer(files.tokenizer(), modality, ImageSizes())

    return {family: renderer(path) for family, path in checkpoints.items()}


@pytest.fixture
def text_rows(tmp_path) -> Path:
    """A small JSONL of text rows whose answers differ in length."""
    from ernie_align.tiny.tokenizer import NUMBERS

    def row(number: int) -> dict[str, Any]:
        answer = " plus ".join(NUMBERS[: 1 + number % 5])
        question = f"What is {NUMBERS[number % 19]} plus {NUMBERS[(3 * number) % 19]}?"
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(24)))
    return path


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
    if stage in ("lora", "dpo"):
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


def tensors_of(folder: Path) -> dict[str, Any]:
    """All weights in a folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def batch_with_images(bundle: Any, digits: Path) -> dict[str, Any]:
    """Two images in one row, one in the next, none in the third; the shorter rows are padded."""
    from ernie_align.data.collate import Collator
    from ernie_align.data.formats import canonical
    from ernie_align.evaluation.generate import renderer_of

    renderer = renderer_of(bundle)
    rows = [
        {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "two"}], "images": images}
        for images in (["images/0001.png", "images/0002.png"], ["images/0003.png"], [])
    ]
    examples = [
        vars(renderer.examples(canonical(row, "messages", digits), max_length=256)[0]) | {"rows": [0, number]}
        for number, row in enumerate(rows)
    ]
    batch = Collator(0, image_processor=bundle.image_processor)(examples)
    return {key: value for key, value in batch.items() if key != "rows"}
