"""Tiny real checkpoints and real images, made once per test process, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import FAMILIES


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    from ernie_align.report.console import quiet_libraries

    quiet_libraries()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """family -> a tiny checkpoint. Its correction biases and routers are not zero, so that routing means something."""
    import gc

    import trl

    from ernie_align.tiny import make_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    made = {family: make_checkpoint(family, folder / family) for family in FAMILIES}
    assert trl.SFTTrainer and trl.DPOTrainer  # imported here, not by the first run
    gc.collect()
    gc.freeze()  # each training run collects garbage: without this, it looks through all libraries every time, 0.3 s
    return made


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
    from ernie_align.data.render import make_renderer
    from ernie_align.models.checkpoint_files import CheckpointFiles
    from ernie_align.models.pixels import ImageSizes
    from ernie_align.models.routing import ModalityTokens

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
