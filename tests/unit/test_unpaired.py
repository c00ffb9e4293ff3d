"""Unpaired preferences: a labeled completion becomes what TRL's KTOTrainer reads, images included."""

from __future__ import annotations

import json

import pytest
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from ernie_align.data.formats import canonicalize, detect_format
from ernie_align.data.preview import preview_example
from ernie_align.data.row import RowDropped, RowFault
from ernie_align.data.unpaired import UnpairedCollator, UnpairedEncoder
from tests.support.runs import FAMILIES

QUESTION, ANSWER = {"role": "user", "content": "What is two plus three?"}, {"role": "assistant", "content": "five"}
SAME = {
    "prompt_completion": {"prompt": [QUESTION], "completion": [ANSWER], "label": True},
    "messages": {"messages": [QUESTION, ANSWER], "label": True},
    "messages, label from a table": {"messages": [QUESTION, ANSWER], "label": 1},
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION["content"]}, {"from": "gpt", "value": "five"}],
        "label": True,
    },
    "alpaca": {"instruction": QUESTION["content"], "output": "five", "label": True},
}


def encode(row, renderer, root=None, *, max_length=512, cut=False):
    encoder = UnpairedEncoder(renderer, max_length=max_length, cut=cut)
    (example,) = encoder(canonicalize(row, detect_format(row), root))
    assert example.keys() == encoder.features().keys()
    return example


@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_same_example(name, renderers):
    assert detect_format(SAME[name]) == name.partition(",")[0]
    assert encode(SAME[name], renderers["vl_moe"]) == encode(SAME["messages"], renderers["vl_moe"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_the_input_of_generate(family, renderers):
    renderer = renderers[family]
    example = encode(SAME["messages"] | {"label": False}, renderer)
    assert example["prompt_ids"] == renderer.prompt(canonicalize({"messages": [QUESTION]}, "messages")).input_ids
    assert renderer.tokenizer.decode(example["completion_ids"]).startswith("five")
    assert example["completion_ids"][-1] in renderer.stop_ids and example["label"] is False
    assert example["completion_mask"] == [1] * len(example["completion_ids"])
    assert example["length"] == len(example["prompt_ids"]) + len(example["completion_ids"])


def test_only_the_last_answer_of_messages_is_labeled(renderers):
    """The whole completion of a prompt/completion row is labeled, with the turns of others masked."""
    more = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    renderer = renderers["dense"]
    example = encode({"messages": [QUESTION, ANSWER, *more], "label": True}, renderer)
    assert "five" in renderer.tokenizer.decode(example["prompt_ids"])
    assert renderer.tokenizer.decode(example["completion_ids"]).startswith("two")
    with pytest.raises(RowFault, match="several turns"):  # this template renders earlier turns differently
        encode({"prompt": [QUESTION], "completion": [ANSWER, *more], "label": True}, renderers["vl_moe"])
    renderer.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + ('</s>' if m.role == 'assistant' else ';') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    example = encode({"prompt": [QUESTION], "completion": [ANSWER, *more], "label": True}, renderer)
    assert "five" in renderer.tokenizer.decode(example["completion_ids"]) and 0 in example["completion_mask"]


def test_text_rows_use_no_template(renderers):
    example = encode({"prompt": "one plus", "completion": " two", "label": False}, renderers["dense"])
    tokenizer = renderers["dense"].tokenizer
    assert tokenizer.decode(example["prompt_ids"]).endswith("one plus")
    assert tokenizer.decode(example["completion_ids"]).strip() == "two</s>"


@pytest.mark.parametrize(
    ("row", "says", "fix"),
    [
        ({"messages": [QUESTION, ANSWER]}, "no label", "label: true"),
        ({"messages": [QUESTION, ANSWER], "label": "good"}, "label is 'good'", "label: true"),
        ({"messages": [QUESTION, ANSWER], "label": 2}, "label is '2'", "label: false"),
        ({"src": ["a"], "tgt": ["b"], "label": [1]}, r"label is '\[1\]'", "label: false"),
        ({"messages": [QUESTION], "label": True}, "no completion", "end it with an answer"),
        ({"prompt": [QUESTION], "completion": [QUESTION], "label": True}, "no completion", "end it with an answer"),
        ({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER], "label": True}, "chosen and rejected", "dpo"),
        ({"messages": [QUESTION, ANSWER | {"label": 0}], "label": True}, "nothing to train", "give it an answer"),
    ],
)
def test_unusable_rows_name_the_fault_and_the_next_move(row, says, fix, renderers):
    with pytest.raises(RowFault, match=says) as caught:
        encode(row, renderers["vl_moe"])
    assert fix in caught.value.fix


def test_a_long_prompt_loses_its_oldest_exchange_but_no_image(renderers, digits):
    seen = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]}
    middle = [{"role": "user", "content": "plus " * 30}, {"role": "assistant", "content": "two"}]
    row = {"messages": [seen, ANSWER, *middle, QUESTION, ANSWER], "images": ["images/0000.png"], "label": True}
    whole = encode(row, renderers["vl_moe"], digits)
    limit = whole["length"] - 1
    with pytest.raises(RowDropped, match=r"over data\.max_length"):
        encode(row, renderers["vl_moe"], digits, max_length=limit)
    cut = encode(row, renderers["vl_moe"], digits, max_length=limit, cut=True)
    assert cut["cut"] and not whole["cut"] and cut["vision_tokens"] == whole["vision_tokens"] == 6
    assert cut["completion_ids"] == whole["completion_ids"] and cut["media"] == whole["media"]


def test_a_text_batch_is_trls_own(renderers):
    """Keys and values of TRL's collator, with completions rotated by one as its trainer does."""
    words = ("one", "one plus two", "seven", "one plus two plus three plus four")
    rows = [{"prompt": f"{word} plus", "completion": f" {word}", "label": len(word) < 6} for word in words]
    examples = [encode(row, renderers["dense"]) | {"rows": [0, place]} for place, row in enumerate(rows)]
    rotated = [
        {**example, "KL_completion_ids": examples[place - 1]["completion_ids"], "ref_logps": -1.5, "ref_KL_logps": -2.5}
        for place, example in enumerate(examples)
    ]
    for max_length in (None, max(example["length"] for example in examples)):
        theirs = DataCollatorForUnpairedPreference(pad_token_id=0, pad_to_multiple_of=8, max_length=max_length)(rotated)
        collator = UnpairedCollator(0, max_length=max_length, pad_to_multiple_of=8)
        batch = collator([example | {"ref_logps": -1.5, "ref_KL_logps": -2.5} for example in examples])
        assert batch.keys() == theirs.keys() | {"rows", "vision_tokens"}
        for name, values in theirs.items():
            assert (batch[name] == values).all() and batch[name].dtype == values.dtype, name
    assert not any(name.startswith("KL_") for name in UnpairedCollator(0, kl=False)(examples))


def test_a_mismatched_completion_shows_the_images_of_its_prompt(renderers, digits):
    from ernie_align.models.load import load_model

    renderer = renderers["vl_moe"]
    lines = (digits / "val.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if '"images": ["' in line][:2]
    rows = [rows[0] | {"label": True}, SAME["messages"], rows[1] | {"label": False}]
    examples = [encode(row, renderer, digits) | {"rows": [0, place]} for place, row in enumerate(rows)]
    processor = load_model(str(renderer.tokenizer.name_or_path)).image_processor
    batch = UnpairedCollator(0, image_processor=processor)(examples)
    assert batch["label"].tolist() == [True, True, False]
    assert len(batch["image_grid_thw"]) == sum(len(example["media"]) for example in examples)
    for prefix, shift in (("", 0), ("KL_", -1)):
        for place, example in enumerate(examples):
            ids = [*example["prompt_ids"], *examples[place + shift]["completion_ids"]]
            assert batch[f"{prefix}input_ids"][place, : len(ids)].tolist() == ids
            assert batch[f"{prefix}attention_mask"][place].sum() == len(ids)
            labeled = batch[f"{prefix}input_ids"][place][batch[f"{prefix}completion_mask"][place].bool()]
            assert labeled.tolist() == examples[place + shift]["completion_ids"]
        placeholders = (batch[f"{prefix}input_ids"] == renderer.vision.placeholder).sum()
        assert placeholders * 4 == len(batch["pixel_values"])


def test_the_preview_shows_prompt_completion_and_label(renderers):
    parts = preview_example(encode(SAME["messages"], renderers["vl_moe"]), renderers["vl_moe"])
    assert list(parts) == ["prompt", "completion, label: true"]
    assert not any(span.trained for span in parts["prompt"])
    assert all(span.trained for span in parts["completion, label: true"])
