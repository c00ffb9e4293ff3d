"""Rows that share a sequence behave like separate rows: same logits, loss, gradients and run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from ernie_align.data.collate import Collator, PaddingFreeCollator, model_inputs
from ernie_align.data.formats import canonicalize
from ernie_align.data.packing import best_fit_decreasing, padding_fraction
from ernie_align.data.render import IGNORE_INDEX, renderer_of
from ernie_align.errors import ModelError, RecipeError
from ernie_align.models.load import load_model
from ernie_align.models.packed_attention import document_lengths, use_per_document_attention
from tests.support.runs import FAMILIES, beside, logged, recipe_of, run_quietly, write_rows

# float32 sums of different lengths and order, at logits of about 1 and losses of about 6
ROUNDING = 1e-5

IMAGES = {
    "text": [[], [], [], []],
    "images": [["0001.png"], ["0002.png", "0003.png"], ["0004.png"], ["0005.png"]],
    "mixed": [["0001.png", "0002.png"], [], ["0003.png"], []],
}


def conversation(digits, number: int, images: list[str]) -> dict:
    """Return a row whose question and answer grow with its number."""
    question = {"role": "user", "content": "Which digit " * (1 + 4 * number) + "?"}
    answer = {"role": "assistant", "content": " plus ".join(["two", "three", "five"][: 1 + number % 3])}
    return {"messages": [question, answer], "images": [str(digits / "images" / name) for name in images]}


def documents(bundle, digits, kind: str) -> list[dict]:
    """Return four encoded rows of different length."""
    renderer = renderer_of(bundle)
    rows = [conversation(digits, number, images) for number, images in enumerate(IMAGES[kind])]
    return [
        vars(renderer.examples(canonicalize(row, "messages", digits), max_length=256)[0]) | {"rows": [0, number]}
        for number, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def bundles(checkpoints):
    """Return a function (family, attention) -> model, which loads each once."""
    kept = {}

    def load(family, attention):
        if (family, attention) not in kept:
            stock = "eager" if attention == "eager" else "sdpa"
            bundle = load_model(str(checkpoints[family]), dtype="float32", attention=stock)
            if attention == "by document":
                use_per_document_attention(bundle.model)
            kept[family, attention] = bundle
        return kept[family, attention]

    return load


@pytest.mark.parametrize("attention", ["sdpa", "eager", "by document"])
@pytest.mark.parametrize(
    ("family", "kind"), [("dense", "text"), ("moe", "text"), *(("vl_moe", kind) for kind in IMAGES)]
)
def test_no_document_attends_to_another(bundles, digits, family, kind, attention):
    bundle = bundles(family, attention)
    examples = documents(bundle, digits, kind)
    flat = PaddingFreeCollator(image_processor=bundle.image_processor)(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    assert document_lengths(flat["position_ids"]) == lengths
    with torch.no_grad():
        packed = bundle.model(**model_inputs(flat)).logits[0].split(lengths)
        for example, together in zip(examples, packed, strict=True):
            alone = bundle.model(**model_inputs(Collator(0, image_processor=bundle.image_processor)([example])))
            assert (together - alone.logits[0]).abs().max() < ROUNDING


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_packed_rows_have_the_loss_and_gradients_of_padded_rows(bundles, digits, kind):
    """Compare the loss summed over tokens, and the gradient of every weight."""
    bundle = bundles("vl_moe", "by document")
    examples = documents(bundle, digits, kind)
    results = []
    for collate in (Collator(0, image_processor=bundle.image_processor), PaddingFreeCollator()):
        collate.image_processor = bundle.image_processor
        batch = collate(examples)
        bundle.model.zero_grad()
        logits = bundle.model(**model_inputs(batch), use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / (targets != IGNORE_INDEX).sum()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in bundle.model.named_parameters() if p.grad is not None}
        results.append((loss.item(), gradients))
    (padded, these), (packed, those) = results
    assert packed == pytest.approx(padded, rel=ROUNDING)
    for name in these.keys() | those.keys():  # padded: zero for experts of padding alone
        one, other = (found.get(name, torch.zeros(())) for found in (these, those))
        assert (one - other).abs().max() < ROUNDING, name


def test_the_first_token_of_a_document_is_not_predicted(bundles, digits):
    """A completion without a prompt: its first token has a label, and the token before it is another row's."""
    first, second = documents(bundles("dense", "sdpa"), digits, "text")[:2]
    second["labels"] = list(second["input_ids"])
    batch = PaddingFreeCollator()([first, second])
    begin = len(first["input_ids"])
    assert batch["labels"][0, begin] == IGNORE_INDEX
    assert batch["labels"][0, begin + 1 :].tolist() == second["labels"][1:]
    padded = Collator(0)([first, second])["labels"]
    assert (batch["labels"][:, 1:] != IGNORE_INDEX).sum() == (padded[:, 1:] != IGNORE_INDEX).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_with_packed_documents_is_refused(bundles, digits, family):
    """With a cache, transformers would silently drop the block mask."""
    bundle = bundles(family, "sdpa")
    batch = model_inputs(PaddingFreeCollator()(documents(bundle, digits, "text")))
    with pytest.raises(ModelError, match="got a cache with 4 documents"):
        bundle.model(**batch, use_cache=True)


def test_several_sequences_of_documents_are_refused_by_document(bundles, digits):
    """With sdpa, transformers' block mask separates them."""
    bundle = bundles("dense", "sdpa")
    batch = model_inputs(PaddingFreeCollator()(documents(bundle, digits, "text")))
    twice = {name: values.expand(2, -1) for name, values in batch.items()}
    with torch.no_grad():
        one, two = bundle.model(**batch).logits, bundle.model(**twice).logits
        assert (two - one).abs().max() < ROUNDING
        with pytest.raises(ModelError, match="needs packed documents in one sequence, got 2"):
            bundles("dense", "by document").model(**twice)


# -- packs -------------------------------------------------------------------------------------------------------------


def test_best_fit_decreasing_on_a_small_example():
    """6 and 4 fill a pack, and so do 5 and 5; 3, 2 and 1 share the third."""
    lengths = [3, 6, 5, 1, 4, 5, 2]
    packs = best_fit_decreasing(lengths, 10, seed=0)
    assert sorted(sorted(lengths[number] for number in pack) for pack in packs) == [[1, 2, 3], [4, 6], [5, 5]]


def test_packs_contain_every_row_once_and_are_nearly_full():
    draw = random.Random(0)
    lengths = [int(60 * 10 ** draw.random()) for _ in range(2000)]
    packs = best_fit_decreasing(lengths, 1024, seed=0)
    assert sorted(number for pack in packs for number in pack) == list(range(2000))
    assert max(sum(lengths[number] for number in pack) for pack in packs) <= 1024
    assert sum(lengths) / (1024 * len(packs)) > 0.99
    assert packs == best_fit_decreasing(lengths, 1024, seed=0) != best_fit_decreasing(lengths, 1024, seed=1)


def test_padding_is_counted():
    assert padding_fraction([4, 4, 4, 4], 2, seed=0) == 0
    assert padding_fraction([1, 3], 2, seed=0) == pytest.approx(1 / 3)
    assert padding_fraction([1, 3], 1, seed=0) == 0


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(digits, tmp_path):
    """Write twelve rows of three lengths, eight of them with images."""
    kinds = (*IMAGES["mixed"][:3], ["0009.png"])
    lines = [conversation(digits, number, images) for number in range(3) for images in kinds]
    for line in lines:
        line["images"] = beside(tmp_path, digits, [f"images/{Path(image).name}" for image in line["images"]])
    return write_rows(tmp_path / "rows.jsonl", lines)


def metrics_of(checkpoints, rows, folder, stage="sft", model="vl_moe", data=(), **training):
    recipe = recipe_of(stage, checkpoints[model], rows, folder, training={"max_steps": 3, **training}, data=dict(data))
    if stage == "lora":
        recipe["adapter"] |= {"scopes": ["attention", "text_experts", "vision_experts"]}
    return run_quietly(recipe)


@pytest.mark.parametrize("stage", ["sft", "lora"])
def test_a_padding_free_run_equals_the_padded_run(checkpoints, rows, tmp_path, stage):
    """Compare every logged number of training and evaluation, also with gradient checkpointing."""
    held_out = {"data": {"eval": [{"path": str(rows)}]}, "per_device_eval_batch_size": 5}
    metrics_of(checkpoints, rows, tmp_path / "padded", stage, **held_out)
    flat = {"padding_free": True, "gradient_checkpointing": True}
    metrics_of(checkpoints, rows, tmp_path / "flat", stage, **held_out, **flat)
    keys = ("loss", "grad_norm", "entropy", "num_tokens", "eval_loss", "eval_mean_token_accuracy")
    for key in keys:
        # Adam divides by the size of each gradient: from the second step on rounding in near-zero ones shows
        assert logged(tmp_path / "flat", key) == pytest.approx(logged(tmp_path / "padded", key), rel=1e-3), key
    for key in ("loss", "grad_norm"):
        first = logged(tmp_path / "padded", key)[0]
        assert logged(tmp_path / "flat", key)[0] == pytest.approx(first, rel=ROUNDING)


def test_a_step_over_all_packs_equals_a_step_over_all_rows(checkpoints, rows, tmp_path):
    """Loss, gradient norm and token count are the same, and the log shows the padding that packing saves."""
    metrics_of(checkpoints, rows, tmp_path / "padded", max_steps=1, per_device_train_batch_size=12)
    packing = {"packing": True, "packing_strategy": "bfd", "gradient_accumulation_steps": 2}
    packing |= {"max_steps": 1, "per_device_train_batch_size": 2, "data": {"max_length": 192}}
    metrics_of(checkpoints, rows, tmp_path / "packed", **packing)
    for key in ("loss", "grad_norm", "num_tokens"):
        padded, packed = (logged(tmp_path / name, key) for name in ("padded", "packed"))
        assert packed == pytest.approx(padded, rel=ROUNDING), key
    (line,) = json.loads((tmp_path / "packed" / "run.json").read_text())["layout"]
    assert line.startswith("packing: 12 rows in 3 packs of up to 192 tokens") and "would be" in line


def test_a_stream_is_packed_on_demand(checkpoints, text_rows, tmp_path):
    data = {"streaming": True, "max_length": 128}
    metrics_of(
        checkpoints, text_rows, tmp_path / "run", model="dense", data=data, packing=True, per_device_train_batch_size=1
    )
    tokens = logged(tmp_path / "run", "num_tokens")
    assert 64 < tokens[0] <= 128 and len(tokens) == 3


def test_other_packing_strategies_are_refused(checkpoints, rows, tmp_path):
    for training, message in (
        ({"packing": True, "packing_strategy": "wrapped"}, "invalid value 'wrapped'"),
        ({"packing_strategy": "bfd"}, "packing_strategy without packing"),
        ({"packing": True, "eval_packing": True}, "held-out rows are never packed"),
    ):
        with pytest.raises(RecipeError, match=message):
            metrics_of(checkpoints, rows, tmp_path / "run", **training)


def test_data_loader_workers_do_not_change_the_run(checkpoints, rows, tmp_path):
    """Images decoded ahead in forked processes give the same run, bit for bit."""
    for workers in (0, 2):
        metrics_of(checkpoints, rows, tmp_path / f"{workers}", packing=True, dataloader_num_workers=workers)
    for key in ("loss", "grad_norm"):
        assert logged(tmp_path / "0", key) == logged(tmp_path / "2", key)
    waited, took = (logged(tmp_path / "0", key) for key in ("data_seconds", "step_seconds"))
    assert all(0 < part < whole for part, whole in zip(waited, took, strict=True))


def test_slow_data_is_logged_once_with_the_key_to_change():
    import time
    from types import SimpleNamespace

    from ernie_align.runs.callbacks.speed_monitor import SpeedMonitor

    for wait, work, expected in ((0.004, 0.001, 1), (0.0, 0.002, 0)):
        said: list[str] = []
        clock = SpeedMonitor(said.append)
        args = SimpleNamespace(dataloader_num_workers=0)
        clock.on_train_begin(args, None, None)
        for _ in range(40):
            time.sleep(wait)
            clock.on_step_begin(args, None, None)
            time.sleep(work)
            clock.on_step_end(args, None, None)
        assert len(said) == expected
        took = clock.take()
        assert took["step_seconds"] >= wait + work and took["data_seconds"] >= wait
        assert clock.take() == {}
    assert all("training.dataloader_num_workers: 2" in line for line in said)
