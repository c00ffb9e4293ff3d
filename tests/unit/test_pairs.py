"""Preferences: every format gives the same pair, a pair shares its prompt, and no pair is dropped silently."""

from __future__ import annotations

import json

import pytest

from ernie_align.data.formats import canonicalize, detect_format
from ernie_align.data.pairs import PairCollator, PairEncoder, SharedPromptCollator, make_pairs
from ernie_align.data.row import Response, RowDropped, RowFault
from tests.support.runs import FAMILIES

QUESTION = {"role": "user", "content": "What is two plus three?"}
RIGHT, WRONG = {"role": "assistant", "content": "five"}, {"role": "assistant", "content": "six"}
ASKED = {"from": "human", "value": QUESTION["content"]}

# One question and one pair in every format.
SAME = {
    "preference": {"prompt": [QUESTION], "chosen": [RIGHT], "rejected": [WRONG]},
    "preference, prompt inside": {"chosen": [QUESTION, RIGHT], "rejected": [QUESTION, WRONG]},
    "preference, prompt as text too": {
        "prompt": QUESTION["content"], "chosen": [QUESTION, RIGHT], "rejected": [QUESTION, WRONG],
    },
    "preference, answers as text": {"prompt": [QUESTION], "chosen": "five", "rejected": "six"},
    "preference, one message each": {"prompt": QUESTION["content"], "chosen": RIGHT, "rejected": WRONG},
    "sharegpt_preference": {
        "conversations": [ASKED],
        "chosen": {"from": "gpt", "value": "five"},
        "rejected": {"from": "gpt", "value": "six"},
    },
    "alpaca_preference": {"question": QUESTION["content"], "chosen": "five", "rejected": "six"},
    "alpaca_preference, instruction": {"instruction": QUESTION["content"], "chosen": "five", "rejected": "six"},
    "erniekit_preference": {
        "src": [QUESTION["content"]], "tgt": [], "response": [["six"], ["five"]], "sort": [0, 1],
    },
    "ultrafeedback": {
        "instruction": QUESTION["content"],
        "completions": [{"response": "six", "overall_score": 2}, {"response": "five", "overall_score": "7.5"}],
    },
}  # fmt: skip


def encoded(row, renderer, root=None, **settings):
    return PairEncoder(renderer, max_length=settings.pop("max_length", 512), **settings)(
        canonicalize(row, detect_format(row), root)
    )


@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_same_pair(name, renderers):
    assert detect_format(SAME[name]) == name.partition(",")[0]
    (pair,) = encoded(SAME[name], renderers["vl_moe"])
    (known,) = encoded(SAME["preference"], renderers["vl_moe"])
    assert pair == known


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_of_a_pair_is_the_input_of_generate(family, renderers):
    renderer = renderers[family]
    (pair,) = encoded(SAME["preference"], renderer)
    assert pair["prompt_ids"] == renderer.prompt(canonicalize({"messages": [QUESTION]}, "messages")).input_ids
    answers = [renderer.tokenizer.decode(pair[f"{side}_ids"]) for side in ("chosen", "rejected")]
    assert answers[0].startswith("five") and answers[1].startswith("six")
    assert pair["chosen_ids"][-1] in renderer.stop_ids and pair["rejected_ids"][-1] in renderer.stop_ids


def test_history_is_context_and_not_compared(renderers):
    history = [QUESTION, WRONG, {"role": "user", "content": "Look at both pictures."}]
    (pair,) = encoded({"prompt": history, "chosen": [RIGHT], "rejected": [WRONG]}, renderers["moe"])
    assert sum(pair["chosen_mask"]) == len(pair["chosen_ids"])
    assert "six" in renderers["moe"].tokenizer.decode(pair["prompt_ids"])


def test_an_answer_whose_turns_are_rendered_differently_in_history_is_refused(renderers):
    """Its log-probs would be computed in a context that never occurs in generation."""
    more = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    row = {"prompt": [QUESTION], "chosen": [RIGHT, *more], "rejected": [WRONG, *more]}
    with pytest.raises(RowFault, match="several turns"):
        encoded(row, renderers["vl_moe"])


def test_thinking_and_tools_are_part_of_the_pair(renderers):
    """Reasoning is compared with thinking on, and counted as left out with thinking off; tools are context."""
    decode = renderers["vl_moe"].tokenizer.decode
    sides = {"chosen": [{**RIGHT, "reasoning_content": "plus"}], "rejected": [WRONG | {"reasoning_content": "one"}]}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    (on,) = encoded({"prompt": [QUESTION], **sides, "thinking": True, "tools": tools}, renderers["vl_moe"])
    assert decode(on["chosen_ids"]).split("</think>")[0].strip() == "plus" and on["reasoning_left_out"] == 0
    assert "add" in decode(on["prompt_ids"])
    (off,) = encoded({"prompt": [QUESTION], **sides}, renderers["vl_moe"])
    assert decode(off["chosen_ids"]).startswith("five") and off["reasoning_left_out"] == 2


def test_text_pairs_use_no_template(renderers):
    (pair,) = encoded({"prompt": "one plus", "chosen": " two", "rejected": " three"}, renderers["dense"])
    (implicit,) = encoded({"chosen": "one plus two", "rejected": "one plus three"}, renderers["dense"])
    tokenizer = renderers["dense"].tokenizer
    assert tokenizer.decode(pair["prompt_ids"]).endswith("one plus")
    assert tokenizer.decode(pair["chosen_ids"]).strip() == "two</s>"
    assert implicit["prompt_ids"] == pair["prompt_ids"]


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ("best_worst", [(3, 0)]),
        ("adjacent", [(3, 2), (2, 0)]),
        ("all", [(3, 2), (3, 0), (3, 0), (2, 0), (2, 0)]),
    ],
)
def test_pairs_of_ranked_answers(pairing, expected):
    ranked = [Response(rank) for rank in (0, 3, 2, 0)]
    assert [(better.rank, worse.rank) for better, worse in make_pairs(ranked, pairing)] == expected


BAD = {
    "chosen equals rejected": {"prompt": [QUESTION], "chosen": [RIGHT], "rejected": [dict(RIGHT)]},
    "rejected: an empty answer": {"prompt": [QUESTION], "chosen": [RIGHT], "rejected": [{**WRONG, "content": " "}]},
    "chosen: an image in only one side": {
        "prompt": [QUESTION],
        "chosen": [{"role": "user", "content": [{"type": "image"}]}, RIGHT],
        "rejected": [WRONG],
    },
    "all answers have the same rank": {"src": "one", "response": [["two"], ["three"]], "sort": [1, 1]},
}


@pytest.mark.parametrize("what", BAD)
def test_a_pair_without_a_signal_is_refused_or_dropped(what, renderers):
    with pytest.raises(RowFault, match=what):
        encoded(BAD[what], renderers["vl_moe"])
    with pytest.raises(RowDropped, match=what):
        encoded(BAD[what], renderers["vl_moe"], drop_bad_pairs=True)


def test_each_stage_refuses_the_rows_of_the_other(renderers):
    from ernie_align.data.collate import RowEncoder

    with pytest.raises(RowFault, match="no preference"):
        encoded({"messages": [QUESTION, RIGHT]}, renderers["moe"])
    with pytest.raises(RowFault, match="a preference row"):
        RowEncoder(renderers["moe"], max_length=512)(canonicalize(SAME["preference"], "preference"))


def test_a_long_prompt_loses_its_oldest_exchange_but_no_image_and_no_answer(renderers, digits):
    """The first exchange shows an image and stays; the second is text and goes."""
    seen = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]}
    middle = [{"role": "user", "content": "plus " * 30}, {"role": "assistant", "content": "two"}]
    row = {"prompt": [seen, WRONG, *middle, QUESTION], "chosen": [RIGHT], "rejected": [WRONG]}
    row["images"] = ["images/0000.png"]
    (whole,) = encoded(row, renderers["vl_moe"], digits)
    limit = len(whole["prompt_ids"]) - 1
    with pytest.raises(RowDropped, match=r"over data\.max_length"):
        encoded(row, renderers["vl_moe"], digits, max_length=limit)
    (cut,) = encoded(row, renderers["vl_moe"], digits, max_length=limit, cut=True)
    assert cut["cut"] and not whole["cut"]
    assert cut["vision_tokens"] == whole["vision_tokens"] == 2 * 6
    assert cut["chosen_ids"] == whole["chosen_ids"] and cut["media"] == whole["media"]
    assert "plus plus" not in renderers["vl_moe"].tokenizer.decode(cut["prompt_ids"])
    with pytest.raises(RowDropped):  # no exchange is left to drop
        encoded(row, renderers["vl_moe"], digits, max_length=20, cut=True)


def test_the_preview_shows_prompt_and_both_sides(renderers):
    from ernie_align.data.preview import format_preview, preview_example

    parts = preview_example(encoded(SAME["preference"], renderers["vl_moe"])[0], renderers["vl_moe"])
    assert list(parts) == ["prompt", "chosen", "rejected"]
    assert not any(span.trained for span in parts["prompt"])
    assert all(span.trained for side in ("chosen", "rejected") for span in parts[side])
    assert format_preview(parts).count("token") == 3


def test_a_batch_is_all_chosen_then_all_rejected_with_each_image_once(renderers, digits):
    from ernie_align.models.load import load_model

    rows = [json.loads(line) for line in (digits / "preferences-val.jsonl").read_text().splitlines()[:2]]
    pairs = [encoded(row, renderers["vl_moe"], digits)[0] for row in rows]
    text = encoded(SAME["preference"], renderers["vl_moe"])[0]
    examples = [pair | {"rows": [0, number]} for number, pair in enumerate([pairs[0], text, pairs[1]])]
    processor = load_model(str(renderers["vl_moe"].tokenizer.name_or_path)).image_processor
    batch = PairCollator(0, image_processor=processor)(examples)
    for number, example in enumerate(examples):
        for side, place in (("chosen", number), ("rejected", 3 + number)):
            ids = [*example["prompt_ids"], *example[f"{side}_ids"]]
            assert batch["input_ids"][place, : len(ids)].tolist() == ids
            assert batch["attention_mask"][place].sum() == len(ids)
            compared = batch["input_ids"][place][batch["completion_mask"][place].bool()]
            assert compared.tolist() == example[f"{side}_ids"]
    # the image tokens of both sides are counted, but the pixels are loaded once
    assert batch["image_grid_thw"].shape == (2, 3) and batch["vision_tokens"] == 4 * 6
    assert len(batch["pixel_values"]) == 2 * 16


def test_a_shared_prompt_precedes_both_answers(renderers, digits):
    rows = [SAME["preference"], {"prompt": "", "chosen": "two three", "rejected": "one"}]
    examples = [encoded(row, renderers["dense"])[0] | {"rows": [0, number]} for number, row in enumerate(rows)]
    batch = SharedPromptCollator(0)(examples)
    for number, example in enumerate(examples):
        lengths = batch["parts"][number].tolist()
        found = batch["input_ids"][number][: sum(lengths)].tolist()
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        assert found == [token for name in names for token in example[name]]
        assert lengths == [len(example[name]) for name in names]
        assert batch["attention_mask"][number].sum() == sum(lengths)
    masks = batch["completion_mask"]
    assert masks.sum(dim=1).tolist() == [
        len(example[f"{side}_ids"]) for side in ("chosen", "rejected") for example in examples
    ]
    # the first token is predicted only after a prompt; without one it is in the column that a loss ignores
    predicted = [bool(example["prompt_ids"]) for example in examples] * 2
    assert masks[:, 1].bool().tolist() == predicted and masks[:, 0].bool().tolist() == [not on for on in predicted]
