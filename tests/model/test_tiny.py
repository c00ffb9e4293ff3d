"""The tiny checkpoints and the digits task: real classes, real images, and the same result for the same seed."""

from __future__ import annotations

import json

import pytest
import torch

from ernie_align.models.architecture import Architecture
from ernie_align.tiny import PRESETS, make_checkpoint, make_digits
from ernie_align.tiny.digits import SPLITS
from ernie_align.tiny.tokenizer import make_tokenizer
from tests.support.runs import tensors_of


def test_the_same_seed_gives_the_same_weights(checkpoints, tmp_path):
    torch.rand(7)
    before = torch.get_rng_state()
    again = tensors_of(make_checkpoint("vl_moe", tmp_path / "again"))
    assert torch.equal(torch.get_rng_state(), before)
    expected = tensors_of(checkpoints["vl_moe"])
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    other = tensors_of(make_checkpoint("vl_moe", tmp_path / "other", seed=1))
    assert not torch.equal(other["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


def test_at_least_three_sparse_layers(checkpoints):
    """With one, a completion-only loss sends no gradient to vision experts: nothing attends to images then."""
    for family in ("moe", "vl_moe"):
        architecture = Architecture.from_config(json.loads((checkpoints[family] / "config.json").read_text()))
        assert {tensor.layer for tensor in architecture.by_part["text_experts"]} == {1, 2, 3}


def test_mini_has_the_real_pools_and_vocabulary():
    assert PRESETS["mini"]["experts"] == 64 and PRESETS["mini"]["top_k"] == 6
    assert PRESETS["mini"]["vocab_size"] == 103424 and PRESETS["mini"]["hidden_size"] == 512


@pytest.mark.parametrize("text", ["seven", " seven", "User: what?\n", "naïve 漢字 🙂", "a  b\t\n\nc", "", "<|weird|>"])
def test_the_tokenizer_is_lossless(text):
    tokenizer = make_tokenizer("vl", vision=True)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_are_those_of_ernie():
    tokenizer = make_tokenizer("vl", vision=True)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<unk>", "<s>", "</s>")
    assert (tokenizer.cls_token, tokenizer.sep_token) == ("<|begin_of_sentence|>", "<|end_of_sentence|>")
    assert tokenizer.image_token == "<|IMAGE_PLACEHOLDER|>" and tokenizer.video_end_token == "<|VIDEO_END|>"
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert all(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in digits)


def test_no_image_is_in_two_splits(digits):
    seen = {}
    for split, size in SPLITS.items():
        rows = [json.loads(line) for line in (digits / f"{split}.jsonl").read_text().splitlines()]
        assert {row["kind"] for row in rows} == {"name", "compare", "sum"}
        assert sum(row["kind"] == "name" for row in rows) == size
        for name in (split, f"parity_{split}", f"inverted_{split}"):
            for row in map(json.loads, (digits / f"{name}.jsonl").read_text().splitlines()):
                for image in row.get("images", []):
                    number = image.removeprefix("images/").removeprefix("inverted_")
                    assert seen.setdefault(number, split) == split
                    assert (digits / image).exists()
    assert len(seen) == 1797


def test_the_answers_are_correct(digits):
    from sklearn.datasets import load_digits

    from ernie_align.tiny.tokenizer import NUMBERS

    labels = load_digits().target
    files = [digits / f"{name}.jsonl" for name in ("test", "parity_test", "inverted_test")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for row in rows:
        shown = [labels[int(image[-8:-4])] for image in row.get("images", [])]
        assert row["answer"] == row["messages"][1]["content"]
        if row["kind"] in ("name", "inverted"):
            assert row["answer"] == NUMBERS[shown[0]]
        elif row["kind"] == "parity":
            assert row["answer"] == ("even", "odd")[shown[0] % 2]
        elif row["kind"] == "compare":
            assert row["answer"] == ("first" if shown[0] > shown[1] else "second") and shown[0] != shown[1]


def test_inverted_is_inverted(digits):
    import numpy as np
    from PIL import Image

    plain, inverted = (np.asarray(Image.open(digits / "images" / f"{prefix}0003.png")) for prefix in ("", "inverted_"))
    assert plain.shape == (56, 56) and (plain.astype(int) + inverted == 255).mean() > 0.9  # up to rounding
    assert np.abs(plain.astype(int) + inverted - 255).max() <= 1


def test_the_task_is_the_same_every_time(digits, tmp_path):
    again = make_digits(tmp_path / "again")
    for path in again.glob("*.jsonl"):
        assert path.read_bytes() == (digits / path.name).read_bytes()
