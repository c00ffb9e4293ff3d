"""training.pad_to_multiple_of makes rows wider and changes no loss."""

from __future__ import annotations

import pytest
import torch

from ernie_align.data.collate import Collator
from ernie_align.data.pairs import PairCollator, SharedPromptCollator
from ernie_align.errors import RecipeError
from ernie_align.runs import load_recipe
from tests.support.runs import FAMILIES, logged, preference, recipe_of, run_quietly, trainer_of, write_rows

MULTIPLE = 48


def padded(collator, *arguments, **settings):
    """Return the same collator without and with padding to a multiple."""
    return collator(*arguments, **settings), collator(*arguments, **settings, pad_to_multiple_of=MULTIPLE)


@pytest.mark.parametrize("left", [False, True])
def test_rows_are_padded(left):
    """On the right or left, with the same values, no row truncated; a batch that fits is unchanged."""
    lengths = (50, 7)
    examples = [
        {
            "input_ids": list(range(1, 1 + length)),
            "labels": list(range(1, 1 + length)),
            "rows": [0, 0],
            "vision_tokens": 0,
            "media": [],
        }
        for length in lengths
    ]
    plain, wide = padded(Collator, 0, left=left)
    before, after = plain(examples), wide(examples)
    added = slice(0, 46) if left else slice(50, 96)
    kept = slice(46, 96) if left else slice(0, 50)
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        assert after[name].shape == (2, 96)
        assert (after[name][:, added] == value).all() and torch.equal(after[name][:, kept], before[name])
    fitting = [{**example, "input_ids": [1] * 48, "labels": [1] * 48} for example in examples]
    assert all(torch.equal(wide(fitting)[name], plain(fitting)[name]) for name in plain(fitting))


@pytest.mark.parametrize("collator", [PairCollator, SharedPromptCollator])
def test_pairs_are_padded(collator):
    example = {
        "prompt_ids": [1] * 30,
        "chosen_ids": [2] * 5,
        "rejected_ids": [3] * 9,
        "chosen_mask": [1] * 5,
        "rejected_mask": [1] * 9,
        "rows": [0, 0],
        "vision_tokens": 0,
        "media": [],
    }
    plain, wide = (collate([example]) for collate in padded(collator, 0))
    assert wide["input_ids"].shape[1] == MULTIPLE > plain["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "completion_mask"):
        width = plain[name].shape[1]
        assert torch.equal(wide[name][:, :width], plain[name]) and not wide[name][:, width:].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["sft", "lora", "dpo", "dpo, shared"])
def test_wider_rows_give_the_same_loss_and_gradients(stage, family, checkpoints, digits, text_rows, tmp_path):
    """Loss and gradient of the first step and the evaluation, where float32 sums have more zeros."""
    name, shared = stage.partition(",")[0], "shared" in stage
    rows = digits / ("preferences-val.jsonl" if name == "dpo" else "val.jsonl")
    results = []
    for multiple in (None, MULTIPLE):
        folder = tmp_path / f"run-{multiple}"
        training = {"max_steps": 1, "pad_to_multiple_of": multiple, "eval_strategy": "steps", "eval_steps": 1}
        recipe = recipe_of(name, checkpoints[family], rows, folder, training=training)
        source = {"path": str(rows), "limit": 8}
        if family != "vl_moe":
            source = {"path": str(text_rows if name != "dpo" else text_pairs(tmp_path)), "limit": 8}
        recipe["data"] |= {"train": [source], "eval": [source]}
        if name == "dpo":
            recipe["dpo"] = {"shared_prompt": shared, "sft_weight": 1.0}
        run_quietly(recipe)
        results.append([logged(folder, key)[0] for key in ("loss", "grad_norm", "eval_loss")])
    assert results[1] == pytest.approx(results[0], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("stage", ["sft", "lora", "dpo", "dpo, shared"])
def test_batches_of_a_trainer_are_padded(stage, checkpoints, text_rows, tmp_path):
    name = stage.partition(",")[0]
    rows = text_pairs(tmp_path) if name == "dpo" else text_rows
    recipe = recipe_of(name, checkpoints["dense"], rows, tmp_path / "run", training={"pad_to_multiple_of": "160"})
    if name == "dpo":
        recipe["dpo"] = {"shared_prompt": "shared" in stage}
    trainer = trainer_of(recipe)
    assert trainer.data_collator(list(trainer.train_dataset)[:4])["input_ids"].shape[1] == 160


def text_pairs(folder):
    pairs = [("two plus three?", "five", "It is six."), ("one plus one?", "two", "nine")] * 4
    return write_rows(folder / "pairs.jsonl", [preference(*pair) for pair in pairs])


@pytest.mark.parametrize("multiple", [8, "8", "auto", "none"])
def test_trls_values_are_accepted(multiple, checkpoints, text_rows, tmp_path):
    recipe = recipe_of("sft", checkpoints["dense"], text_rows, tmp_path / "run")
    recipe["training"] |= {"pad_to_multiple_of": multiple}
    assert load_recipe(recipe).training["pad_to_multiple_of"] == multiple


@pytest.mark.parametrize(
    ("stage", "training", "what"),
    [
        ("sft", {"pad_to_multiple_of": 8, "packing": True}, "pad_to_multiple_of 8 without padding"),
        ("lora", {"pad_to_multiple_of": 8, "padding_free": True}, "pad_to_multiple_of 8 without padding"),
        ("dpo", {"pad_to_multiple_of": 0}, "pad_to_multiple_of 0 is not a length"),
        ("lora", {"pad_to_multiple_of": "eight"}, "pad_to_multiple_of eight is not a length"),
        ("upo", {"pad_to_multiple_of": 8}, "this key is not set under training"),
    ],
)
def test_unsupported_padding_is_refused(stage, training, what, checkpoints, text_rows, tmp_path):
    recipe = recipe_of(stage, checkpoints["dense"], text_rows, tmp_path / "run", training=training)
    if stage == "upo":
        recipe["rewards"] = [{"name": "contains", "text": "e"}]
        recipe["adapter"] = {"scopes": ["attention"]}
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert what in [fault.what for fault in caught.value.faults]
