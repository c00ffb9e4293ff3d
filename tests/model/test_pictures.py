"""Pictures for notebooks are PNGs of the data they are given."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

from ernie_align.errors import DataError
from ernie_align.evaluation import describe, route, routed_tokens
from ernie_align.models.load import load_model
from ernie_align.report import curves, expert_load, gallery, read_metric, token_map
from ernie_align.report.progress import ProgressBar


def opened(picture):
    return Image.open(io.BytesIO(picture._repr_png_())).convert("RGB")


@pytest.fixture(scope="module")
def bundle(checkpoints):
    return load_model(checkpoints["vl_moe"])


def test_a_tokens_experts_are_those_of_its_own_pool_row_by_row(bundle, digits):
    """Row 2 has the same experts after two other rows as alone, and each token has 2 of its pool in each layer."""
    picture = route(bundle, digits / "test.jsonl", rows=3)
    last = routed_tokens(bundle, picture, row=2)
    assert [token.text for token in last] == [bundle.tokenizer.convert_ids_to_tokens(i).replace("▁", " ")
                                              for i in picture.ids[2]]  # fmt: skip
    for layer in (1, 2, 3):
        for pool in ("text", "vision"):
            before = sum(
                (token in bundle.modality.ids) == (pool == "vision") for ids in picture.ids[:2] for token in ids
            )
            expected = picture.chosen[layer, pool][before:].tolist()
            assert [token.experts[layer] for token in last if token.pool == pool] == expected
    assert {len(experts) for token in last for experts in token.experts.values()} == {2}


def test_the_routing_is_drawn(bundle, digits):
    picture = route(bundle, digits / "test.jsonl", rows=3)
    drawn = opened(token_map(routed_tokens(bundle, picture)))
    colors = {color for _, color in drawn.getcolors(maxcolors=1 << 24)}
    assert (0x2F, 0x81, 0xF7) in colors and (0xC0, 0x26, 0xD3) in colors  # text experts, vision experts
    assert opened(expert_load(describe(picture)["layers"])).size > (300, 100)


def test_a_text_model_is_drawn_too(checkpoints, text_rows):
    bundle = load_model(checkpoints["moe"])
    tokens = routed_tokens(bundle, route(bundle, text_rows, rows=1))
    assert {token.pool for token in tokens} == {"text"} and opened(token_map(tokens)).width > 300


def test_a_gallery_shows_the_images_it_is_given(tmp_path):
    """A gray that stands nowhere else in the picture."""
    Image.new("L", (20, 20), 77).save(tmp_path / "gray.png")
    shown = opened(
        gallery([([tmp_path / "gray.png"], "+ right\n- a caption that is longer than a line"), ([], "none")])
    )
    assert (77, 77, 77) in {color for _, color in shown.getcolors(maxcolors=1 << 24)}


def test_read_metric(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in (1, 2)) + '{"step": 3'  # incomplete
    )
    assert read_metric(tmp_path, "loss") == [(1, 1.0), (2, 0.5)]
    assert opened(curves({"loss": read_metric(tmp_path, "loss")})).width > 300
    with pytest.raises(DataError, match="the run did not log los"):
        read_metric(tmp_path, "los")


def test_a_notebook_gets_lines_and_no_bar():
    """In a notebook rich's bar needs ipywidgets, and warns if they are absent."""
    bar = ProgressBar(Console(force_jupyter=True, quiet=True))
    bar.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, max_steps=3, global_step=0), None)
    assert bar.progress is not None and not bar.progress.live.is_started
    bar.on_train_end(None, None, None)
