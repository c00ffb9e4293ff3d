"""Rows become prompts for a policy to answer."""

from __future__ import annotations

import json

import pytest

from ernie_align.data.formats import canonicalize, detect_format
from ernie_align.data.prompts import PromptEncoder
from ernie_align.data.row import RowDropped, RowFault

ASKED = {"role": "user", "content": "What is one plus two?"}


def encode(renderer, values, **options):
    (example,) = PromptEncoder(renderer, **{"max_length": 256, **options})(canonicalize(values, detect_format(values)))
    return example


def test_a_prompt_is_the_input_of_generate(renderers, family):
    renderer = renderers[family]
    row = canonicalize({"prompt": [ASKED], "answer": "three", "kind": "sum"}, "prompt")
    example = encode(renderer, {"prompt": [ASKED], "answer": "three", "kind": "sum"})
    assert example["input_ids"] == renderer.prompt(row).input_ids
    assert json.loads(example["columns"]) == {"answer": "three", "kind": "sum"}
    assert json.loads(example["prompt"]) == [ASKED]
    assert (example["trained"], example["cut"], example["opened"]) == (0, False, False)


def test_the_known_answer_is_a_column_and_not_in_the_prompt(renderers, family):
    conversation = {"messages": [ASKED, {"role": "assistant", "content": "three"}]}
    example = encode(renderers[family], conversation)
    assert example["input_ids"] == encode(renderers[family], {"prompt": [ASKED]})["input_ids"]
    assert json.loads(example["columns"]) == {"answer": "three"}
    assert json.loads(encode(renderers[family], {**conversation, "answer": "3"})["columns"]) == {"answer": "3"}


def test_images_are_counted_and_kept(renderers, digits):
    values = json.loads((digits / "prompts.jsonl").read_text().splitlines()[0])
    row = canonicalize(values, "prompt", digits)
    (example,) = PromptEncoder(renderers["vl_moe"], max_length=256)(row)
    assert len(example["media"]) == len(values["images"]) > 0
    assert example["vision_tokens"] == 6 * len(values["images"])  # 4 placeholders, a start and an end each


def test_plain_text_is_used_unchanged(renderers):
    example = encode(renderers["dense"], {"prompt": "one plus two is"})
    assert example["input_ids"] == renderers["dense"].tokenizer("one plus two is")["input_ids"]
    assert json.loads(example["prompt"]) == "one plus two is"


def test_a_prompt_that_opens_a_thinking_block_is_marked(renderers):
    """The VL template opens a thinking block, and closes it at once if thinking is off."""
    assert encode(renderers["vl_moe"], {"prompt": [ASKED], "thinking": True})["opened"] is True
    assert encode(renderers["vl_moe"], {"prompt": [ASKED], "thinking": False})["opened"] is False


def test_long_prompts_are_dropped_or_lose_their_oldest_exchange(renderers):
    earlier = [{"role": "user", "content": "one " * 40}, {"role": "assistant", "content": "two"}]
    with pytest.raises(RowDropped, match="max_length 40"):
        encode(renderers["dense"], {"prompt": [*earlier, ASKED]}, max_length=40)
    example = encode(renderers["dense"], {"prompt": [*earlier, ASKED]}, max_length=40, cut=True)
    assert (json.loads(example["prompt"]), example["cut"]) == ([ASKED], True)
    with pytest.raises(RowDropped):
        encode(renderers["dense"], {"prompt": [earlier[0]]}, max_length=40, cut=True)


@pytest.mark.parametrize(
    ("values", "options", "what"),
    [
        ({"chosen": [ASKED, {"role": "assistant", "content": "a"}], "rejected": [ASKED]}, {}, "a preference row"),
        ({"messages": [{"role": "assistant", "content": "three"}]}, {}, "no question"),
        ({"prompt": [ASKED]}, {"domain_column": "kind"}, "column kind"),
        ({"prompt": [ASKED]}, {"reward_columns": {"exact_match": ("answer",)}}, "exact_match reads answer"),
    ],
)
def test_rows_without_a_prompt_or_reward_are_refused(renderers, values, options, what):
    row = canonicalize(values, detect_format(values))
    with pytest.raises(RowFault) as error:
        PromptEncoder(renderers["dense"], max_length=256, **options)(row)
    assert what in error.value.what


def test_a_row_needs_one_reward_that_can_score_it(renderers):
    reward_columns = {"exact_match": ("answer",), "iou": ("box",)}
    assert encode(renderers["dense"], {"prompt": [ASKED], "box": [0, 0, 1, 1]}, reward_columns=reward_columns)
