"""Every input format becomes the same canonical row."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest

from ernie_align.data.formats import canonicalize, detect_format
from ernie_align.data.row import RowFault, count_images

ROOT = Path("media")
SEEN = {"path": "media/a.png", "bytes": None}
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


def turns(row, format=None, root=ROOT):
    row = canonicalize(row, format or detect_format(row), root)
    return [(message["role"], message["content"], message.get("label", 1)) for message in row.messages], row


def test_messages():
    row = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        "kind": "k",
        "answer": "ho",
    }
    messages, row = turns(row)
    assert messages == [("user", "hi", 1), ("assistant", "ho", 1)]
    assert row.columns == {"kind": "k", "answer": "ho"} and row.images == []


def test_messages_with_image_parts_and_a_column():
    parts = [dict(IMAGE), dict(TEXT), {"type": "image", "text": None}]  # None: a missing key in a table
    row = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}],
        "images": ["a.png", "a.png"],
    }
    messages, row = turns(row)
    assert messages[0][1] == [IMAGE, TEXT, IMAGE] and row.images == [SEEN, SEEN]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)
def test_images_inside_their_part(part):
    row = {"messages": [{"role": "user", "content": [part, TEXT]}, {"role": "assistant", "content": "a"}]}
    messages, row = turns(row)
    assert messages[0][1] == [IMAGE, TEXT] and row.images == [SEEN]


def test_images_without_a_part_are_placed_before_the_first_question():
    """As in TRL."""
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}], "image": "a.png"}
    messages, row = turns(row)
    assert messages[0][1] == [IMAGE, TEXT] and row.images == [SEEN]


def test_placeholders_in_the_text_place_images():
    row = {
        "conversations": [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "no"}],
        "images": ["a.png", "a.png"],
    }
    messages, _ = turns(row)
    assert messages[0][1] == [
        {"type": "text", "text": "Is "},
        IMAGE,
        {"type": "text", "text": " like "},
        IMAGE,
        {"type": "text", "text": "?"},
    ]
    messages, row = turns(
        {"conversations": [{"from": "human", "value": "Say <image>"}, {"from": "gpt", "value": "no"}]}
    )
    assert messages[0][1] == "Say <image>"  # without an images column it is text like any other


def test_prompt_completion_trains_only_the_completion():
    history = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    row = {"prompt": history, "completion": [{"role": "assistant", "content": "4"}]}
    messages, row = turns(row)
    assert [label for _, _, label in messages] == [1, 0, 1, 1] and row.trained_turns == [3]
    _, row = turns({"prompt": "The sky is", "completion": " blue."})
    assert row.plain == ("The sky is", " blue.") and row.messages == []


def test_sharegpt_with_tools():
    row = {
        "system": "Add.",
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "1+2"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"l": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "three", "label": 0},
        ],
    }
    messages, row = turns(row)
    assert [role for role, _, _ in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"l": 1}}}]
    assert row.tools == [{"name": "add"}] and row.trained_turns == [2]


def test_alpaca():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["hi", "ho"]], "system": "S"}
    messages, _ = turns(row)
    assert messages == [
        ("system", "S", 1),
        ("user", "hi", 1),
        ("assistant", "ho", 1),
        ("user", "Add.\n1 2", 1),
        ("assistant", "3", 1),
    ]


def test_erniekit_text():
    messages, row = turns({"src": ["a", "c"], "tgt": ["b", "d"], "label": [0, 1], "system": "S"})
    assert messages == [
        ("system", "S", 1),
        ("user", "a", 1),
        ("assistant", "b", 0),
        ("user", "c", 1),
        ("assistant", "d", 1),
    ]
    assert row.trained_turns == [4]
    assert turns({"src": "a", "tgt": "b"})[0] == [("user", "a", 1), ("assistant", "b", 1)]


def test_erniekit_vision():
    row = {
        "text_info": [
            {"text": "Look:", "tag": "mask"},
            {"text": "What?", "tag": "mask"},
            {"text": "a dog", "tag": "no_mask"},
        ],
        "image_info": [{"image_url": "a.png", "matched_text_index": 1}],
    }
    messages, row = turns(row)
    assert messages == [("user", [{"type": "text", "text": "Look:"}, IMAGE, TEXT], 1), ("assistant", "a dog", 1)]
    assert row.images == [SEEN]


def test_reasoning_is_read_from_the_text_or_its_own_key():
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    _, row = turns({"messages": [{"role": "user", "content": "?"}, inline], "thinking": True})
    assert (row.messages[1]["reasoning_content"], row.messages[1]["content"], row.thinking) == ("hm", "yes", True)
    _, row = turns({"messages": [{"role": "user", "content": "?"}], "chat_template_kwargs": {"enable_thinking": False}})
    assert row.thinking is False


def test_tool_calls_with_arguments_as_text():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    _, row = turns(row)
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1} and row.messages[1]["content"] == ""


def encoded():
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="PNG")
    return stream.getvalue()


def test_images_as_bytes_base64_and_objects():
    from PIL import Image

    png = encoded()
    text = base64.b64encode(png + b"\0" * 300).decode()
    given = [png, {"bytes": png, "path": "x.png"}, f"data:image/png;base64,{base64.b64encode(png).decode()}", text]
    row = {"messages": [{"role": "user", "content": "?"}], "images": [*given, Image.new("RGB", (8, 8))]}
    _, row = turns(row)
    assert count_images(row.messages) == 5
    assert all(image["path"] is None and image["bytes"].startswith(b"\x89PNG") for image in row.images)


USER, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"foo": 1}, "no known format has the columns foo"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an empty answer"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "role 'bot'"),
        ({"messages": [{"content": "a"}]}, "without a role"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is int"),
        ({"messages": [{"role": "user", "content": [IMAGE]}], "images": []}, "1 image parts for 0 images"),
        ({"messages": [{"role": "user", "content": [IMAGE]}], "images": ["a", "b"]}, "1 image parts for 2 images"),
        ({"conversations": [{"from": "human", "value": "<image>"}], "images": ["a", "b"]}, "1 image parts for 2"),
        ({"messages": [USER], "images": ["https://x/y.png"]}, "not fetched from the network"),
        ({"messages": [USER], "images": ["data:image/png;base64,@@"]}, "not base64"),
        ({"messages": [USER], "images": [3]}, "an image is int"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "videos are not supported yet"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "content part of type 'audio'"),
        ({"messages": [USER, {"role": "assistant", "content": [IMAGE]}], "images": ["a"]}, "an image in an answer"),
        ({"messages": [USER, {**ANSWER, "label": 2}]}, "label 2"),
        ({"prompt": "a", "completion": [ANSWER]}, "both be text or both be messages"),
        ({"prompt": "a", "completion": "b", "images": ["a"]}, "images in a row of plain text"),
        ({"src": ["a"], "tgt": ["b", "c"]}, "1 src, 2 tgt and 2 label"),
        ({"text_info": [{"text": "a", "tag": "x"}]}, "tag 'x'"),
        ({"text_info": [{"text": "a", "tag": "mask"}], "image_info": [{"matched_text_index": 4}]}, "matches no text"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown speaker 'alien'"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "is not a pair"),
        ({"messages": [USER], "tools": "{"}, "tools: not JSON"),
        ({"messages": [USER], "thinking": "yes"}, "thinking is 'yes'"),
    ],
)  # fmt: skip
def test_faulty_rows_name_the_fault_and_the_next_move(row, says):
    with pytest.raises(RowFault) as caught:
        canonicalize(row, detect_format(row), ROOT)
    assert says in caught.value.what and caught.value.fix


def test_a_named_format_is_not_detected_again():
    with pytest.raises(RowFault, match="a alpaca row without instruction, output"):
        canonicalize({"messages": []}, "alpaca")
