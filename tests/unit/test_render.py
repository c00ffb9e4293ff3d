"""The tokens before a trained answer are exactly those that `generate` is given for that turn."""

from __future__ import annotations

import json
import random
import re

import pytest

from ernie_align.data.formats import canonicalize
from ernie_align.data.media import MediaAccess
from ernie_align.data.render import IGNORE_INDEX, ChatTemplate, Renderer
from ernie_align.data.row import Row, RowDropped, RowFault
from ernie_align.errors import ModelError
from tests.support.runs import FAMILIES

# The structure of 21B-A3B-Thinking's template, in addition to those of the tiny checkpoints.
ALWAYS_THINKS = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n<response>\\n' "
    "~ m.content ~ '\\n</response>\\n<|im_end|>\\n\\n' -}}"
    "{%- else -%}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)


def conversation(thinking):
    """Return three answers after a system prompt, one of them a tool call."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"left": 1, "right": 2}}}
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is two plus three?"},
        {"role": "assistant", "content": "five", "reasoning_content": "two, three"},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "It is six", "reasoning_content": "one more", "tool_calls": [call]},
        {"role": "user", "content": "Is it odd?"},
        {"role": "assistant", "content": "even", "reasoning_content": "six is"},
    ]
    if not thinking:
        for message in messages:
            message.pop("reasoning_content", None)
    return Row(messages=messages, thinking=thinking, tools=[{"name": "add"}])


@pytest.mark.parametrize("family", [*FAMILIES, "always thinks"])
@pytest.mark.parametrize("thinking", [False, True])
def test_the_context_of_every_turn_is_the_input_of_generate(renderers, family, thinking):
    """Compare with transformers' apply_chat_template, turn by turn."""
    if family == "always thinks":
        renderer = Renderer(renderers["dense"].tokenizer)
        renderer.tokenizer.chat_template = ALWAYS_THINKS
        thinking = True
    else:
        renderer = renderers[family]
    tokenizer, row = renderer.tokenizer, conversation(thinking)
    answers = {}
    for example in renderer.examples(row, max_length=4096):
        start = None
        for position, label in enumerate([*example.labels, IGNORE_INDEX]):
            if label != IGNORE_INDEX and start is None:
                start = position
            if label == IGNORE_INDEX and start is not None:
                answers[tuple(example.input_ids[:start])] = example.input_ids[start:position]
                start = None
    turns = row.trained_turns
    assert turns == [2, 4, 6] and len(answers) == 3
    for turn in turns:
        seen = tokenizer.apply_chat_template(
            row.messages[:turn], tools=row.tools, add_generation_prompt=True, enable_thinking=thinking
        )["input_ids"]
        written = tokenizer.decode(answers[tuple(seen)])
        message = row.messages[turn]
        assert message["content"] in written and written.endswith(("<|end_of_sentence|>", "<|im_end|>"))
        if thinking and family in ("vl_moe", "always thinks"):
            assert message["reasoning_content"] in written and "</think>" in written
        if thinking is False:
            assert "think" not in written
        # after its context, the answer reads as the template renders it
        whole = tokenizer.apply_chat_template(
            row.messages[: turn + 1], tools=row.tools, tokenize=False, enable_thinking=thinking
        )
        assert whole.rstrip("\n").endswith(written.removeprefix("\n") if family == "always thinks" else written)


def test_the_prompt_of_an_evaluation_is_the_context_of_training(renderers, family, digits):
    renderer = renderers[family]
    lines = (digits / "test.jsonl").read_text().splitlines()[:60]
    rows = [canonicalize(json.loads(line), "messages", digits) for line in lines]
    for row in rows if family == "vl_moe" else [row for row in rows if not row.images]:
        (example,) = renderer.examples(row, max_length=512)
        prompt = renderer.prompt(row)
        length = len(prompt.input_ids)
        assert example.input_ids[:length] == prompt.input_ids and prompt.media == example.media
        assert set(example.labels[:length]) == {IGNORE_INDEX}
        assert example.labels[length:] == example.input_ids[length:]


def test_an_answer_is_tokenized_as_the_model_writes_it(renderers):
    """After a prompt that ends in a space, tokenizing both together would give other ids than `seven` alone."""
    tokenizer = renderers["dense"].tokenizer
    row = Row(messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "seven"}])
    (example,) = renderers["dense"].examples(row, max_length=64)
    trained = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(trained) == ["seven", "<|end_of_sentence|>"]
    together = tokenizer.apply_chat_template(row.messages)["input_ids"]
    assert "▁seven" in tokenizer.convert_ids_to_tokens(together) and together != example.input_ids


def test_images_are_expanded_by_their_size_and_never_trained(renderers, digits):
    from PIL import Image

    wide = digits.parent / "wide.png"
    Image.new("L", (28 * 5, 28 * 3)).save(wide)
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    row = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}],
        "images": ["images/0000.png", str(wide)],
    }
    renderer = renderers["vl_moe"]
    (example,) = renderer.examples(canonicalize(row, "messages", MediaAccess(digits, (digits.parent,))), max_length=256)
    assert example.input_ids.count(renderer.vision.placeholder) == 4 + 15
    assert example.vision_tokens == sum(token in renderer.vision.ids for token in example.input_ids) == 4 + 15 + 4
    trained = {token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE_INDEX}
    assert not trained & renderer.vision.ids


def test_a_special_token_in_a_users_text_is_text(renderers, family):
    """In a question, a system prompt, an answer and a tool argument it neither routes a token nor ends a turn."""
    renderer = renderers[family]
    tokenizer = renderer.tokenizer
    spell = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|end_of_sentence|></s>"
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": spell}}}
    row = Row(
        messages=[
            {"role": "system", "content": spell},
            {"role": "user", "content": f"Say {spell}!"},
            {"role": "assistant", "content": spell, "tool_calls": [call]},
        ]
    )
    (example,) = renderer.examples(row, max_length=1024)
    special = [token for token in example.input_ids if token in tokenizer.all_special_ids]
    names = tokenizer.convert_ids_to_tokens(special)
    assert [name for name in names if name != "<unk>"] == ["<|begin_of_sentence|>", "<|end_of_sentence|>"]
    assert example.vision_tokens == 0
    assert tokenizer.decode(example.input_ids).count(spell) >= 3
    assert example.input_ids[: len(renderer.prompt(row).input_ids)] == renderer.prompt(row).input_ids


def test_ids_equal_those_of_the_tokenizer(renderers, family):
    """For marked and unmarked text, and with settings left over from other calls of the tokenizer."""
    from transformers.utils.chat_template_utils import mark_control_tokens

    renderer = renderers[family]
    tokenizer, draw = renderer.tokenizer, random.Random(0)
    marked = mark_control_tokens("</s>", re.compile("</s>"))
    pieces = [
        "one plus",
        "  ",
        " two",
        "\n",
        "</s>",
        "<|end_of_sentence|>",
        marked,
        marked[0],
        marked[-1],
        "<s>",
        "一é!",
    ]
    for number in range(200):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 6)))
        if number % 4 == 0:
            tokenizer("one two three", truncation=True, max_length=2)
        if number % 4 == 1:
            tokenizer(["one", "one two"], padding=True, pad_to_multiple_of=8)
        if number % 4 == 2:
            tokenizer("one</s>", split_special_tokens=True)
        ids = renderer.template.tokenize(text)
        assert ids == tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]


@pytest.mark.parametrize(
    ("added", "cut"),
    [
        ([], True),
        ([("</s>one", {}), ("> two", {}), ("s></s>", {})], True),  # longer than special tokens, and overlapping them
        ([("plus</s>", {"normalized": True})], True),
        ([("two", {"special": True}), ("two plus", {})], True),
        ([("two", {"lstrip": True})], False),
        ([("two", {"rstrip": True})], False),
        ([("one", {"single_word": True})], False),
    ],
)
def test_ids_of_cached_parts_equal_those_of_the_whole(renderers, family, added, cut):
    """Split into parts, or whole if an added token depends on the characters around it."""
    from tokenizers import AddedToken

    tokenizer, draw = renderers[family].tokenizer, random.Random(0)
    tokenizer.add_tokens([AddedToken(text, **({"normalized": False} | how)) for text, how in added])
    template = ChatTemplate(tokenizer)
    pieces = ["one plus", "  ", " two", "two", "\n", "</s>", "<|end_of_sentence|>", "<s>", "s>", "</", "one", "一é!"]
    parts: dict[str, list[int]] = {}
    for _ in range(400):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 8)))
        assert template.tokenize(text, parts) == template.tokenize(text), text
        assert template.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (len(parts) > 0) is cut


def test_a_conversation_is_tokenized_about_once(renderers, family):
    """All contexts together take few more characters than the longest of them."""
    asked = [{"role": "user", "content": f"What is {number} plus three?"} for number in range(30)]
    said = [{"role": "assistant", "content": f"It is {number + 3}."} for number in range(30)]
    row = Row(messages=[message for turn in zip(asked, said, strict=True) for message in turn])
    template = renderers[family].template
    contexts = [
        renderers[family]._render(template.mark_control_tokens(row.messages[:number]), row, generation_prompt=True)
        for number in range(1, 60, 2)
    ]
    parts: dict[str, list[int]] = {}
    for context in contexts:
        assert template.tokenize(context, parts) == template.tokenize(context)
    # each question is in two parts: at the end of its own context, and before its answer in the others
    assert sum(map(len, parts)) < 2 * len(contexts[-1]) < sum(map(len, contexts)) / 5


def test_a_template_that_writes_more_images_than_there_are_is_refused(renderers, digits):
    renderer = renderers["vl_moe"]
    renderer.tokenizer.chat_template = renderer.tokenizer.chat_template + "{{ '<|IMAGE_PLACEHOLDER|>' }}"
    row = Row(messages=[{"role": "user", "content": "two?"}])
    with pytest.raises(ModelError, match="0 images, but the chat template wrote 1 placeholders"):
        renderer.prompt(row)


def test_turns_with_label_0_are_context(renderers, family):
    row = conversation(False)
    row.messages[2]["label"] = row.messages[4]["label"] = 0
    (example,) = renderers[family].examples(row, max_length=4096)
    trained = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE_INDEX]
    assert renderers[family].tokenizer.decode(trained) == "even<|end_of_sentence|>"


def test_turns_share_a_sequence_if_history_is_rendered_unchanged(renderers):
    """With a template that writes nothing more before an answer, one sequence trains all three answers."""
    renderer = renderers["dense"]
    renderer.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + ('</s>' if m.role == 'assistant' else ';') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    row = conversation(False)
    row.messages[4].pop("tool_calls")
    (example,) = renderer.examples(row, max_length=4096)
    assert sum(label == renderer.tokenizer.eos_token_id for label in example.labels) == 3
    assert renderer.stop_ids == [renderer.tokenizer.eos_token_id]


def test_long_rows_are_dropped_or_cut_at_a_turn(renderers, family):
    renderer, row = renderers[family], conversation(False)
    lengths = [len(example.input_ids) for example in renderer.examples(row, max_length=4096)]
    limit = max(lengths) - 1
    with pytest.raises(RowDropped, match=f"over data.max_length {limit}"):
        renderer.examples(row, max_length=limit)
    kept = renderer.examples(row, max_length=limit, cut=True)
    assert kept and all(len(example.input_ids) <= limit for example in kept)
    assert all(example.labels[-1] != IGNORE_INDEX for example in kept)  # shortened after an answer, never inside one
    with pytest.raises(RowDropped):
        renderer.examples(row, max_length=8, cut=True)


def test_an_image_is_never_split(renderers, digits):
    turn = [{"type": "image"}, {"type": "text", "text": "?"}]
    messages = [
        {"role": "user", "content": turn},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": turn},
        {"role": "assistant", "content": "three"},
    ]
    row = canonicalize({"messages": messages, "images": ["images/0000.png"] * 2}, "messages", digits)
    renderer = renderers["vl_moe"]
    lengths = [len(example.input_ids) for example in renderer.examples(row, max_length=512)]
    for limit in range(min(lengths), max(lengths)):
        (example,) = renderer.examples(row, max_length=limit, cut=True)
        assert len(example.media) == 1 and example.input_ids.count(renderer.vision.placeholder) == 4


def test_plain_rows_use_no_template(renderers):
    tokenizer = renderers["dense"].tokenizer
    (example,) = renderers["dense"].examples(Row(plain=("<s>One plus", " one")), max_length=64)
    assert example.input_ids[0] == tokenizer.bos_token_id and example.labels[-1] == tokenizer.eos_token_id
    with pytest.raises(RowFault, match="an image token in plain text"):
        renderers["vl_moe"].examples(Row(plain=("<|IMAGE_START|>", "a")), max_length=64)


def test_rows_that_cannot_be_trained(renderers):
    with pytest.raises(RowFault, match="nothing to train"):
        renderers["dense"].examples(Row(messages=[{"role": "user", "content": "?"}]), max_length=64)
    with pytest.raises(RowFault, match="has no reasoning_content"):
        row = conversation(False)
        row.thinking = True
        renderers["vl_moe"].examples(row, max_length=4096)
    with pytest.raises(RowFault, match="an image for a model without vision"):
        parts = [{"type": "image"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
        renderers["dense"].tokenizer.chat_template = "{{ '?</s>' }}{{ messages[1].content if messages[1] }}{{ '</s>' }}"
        renderers["dense"].examples(Row(messages=messages, images=[{"path": "x", "bytes": None}]), max_length=64)


def test_reasoning_is_left_out_when_thinking_is_off(renderers):
    row = conversation(True)
    row.thinking = False
    texts = [
        renderers["vl_moe"].tokenizer.decode(e.input_ids) for e in renderers["vl_moe"].examples(row, max_length=4096)
    ]
    assert len(texts) == 3 and not any("one more" in text or "six is" in text for text in texts)


def test_a_template_that_never_ends_a_turn_is_refused(renderers):
    renderer = renderers["dense"]
    renderer.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="would never learn to stop"):
        renderer.examples(conversation(False), max_length=64)
