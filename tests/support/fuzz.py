"""Hostile values, and documents with some of their values, keys or bytes replaced."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NESTED: list[Any] = []
for _ in range(60):
    NESTED = [NESTED]

SCALARS = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, -1e-308, 2**31, 2**63, -(2**64), 10**30,
    "", " ", "\n", "\0", "a\0b", "\u202e", "\x1b[2J", "é" * 300, "a" * 5000, "\ufeff", "\U0001d54f",
    "null", "true", "1e999", "NaN", "~", "0x10", "1_0", "=", "<<", "*a", "&a", "!!python/object:os.system",
    "{{ 7 * 7 }}", "{% for x in y %}", "{{ ''.__class__ }}", "<image>", "<image><image>", "<think>", "</think>",
    "<think>\na\n</think>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|end_of_sentence|>", "</s>", "<s>",
    "user", "assistant", "system", "tool", "human", "gpt", "function_call", "mask", "no_mask", "text", "image", "video",
    "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "pipe.png", "folder", "broken.png", "ok.png",
    "bomb.png", "file:///etc/passwd", "http://127.0.0.1:9/a.png", "ftp://x/y", "s3://x/y", "https://[::1",
    "data:image/png;base64,AAAA", "data:image/png,x", "data:", "x" * 300, "A" * 400, "%00", "~/x", "C:\\x", "a/" * 3000,
    '{"a": 1', '[{"name": "f"}]', '{"name": "f", "arguments": "x"}', "[]", "{}", "[[[[", "1", '"x"',
]  # fmt: skip
KEYS = [
    "", "role", "content", "type", "text", "image", "image_url", "images", "url", "path", "bytes", "from", "value",
    "messages", "label", "weight", "tool_calls", "function", "name", "arguments", "reasoning_content", "thinking",
    "tools", "system", "history", "score", "response", "chat_template_kwargs", "enable_thinking", "matched_text_index",
    "__class__", "a\0b", "items", "get", "keys", "é", "stage", "rank", "scopes", "x" * 200, "video_info", "input",
]  # fmt: skip
HOSTILE: list[Any] = [
    *SCALARS, [], {}, [[]], [{}], [None], [""], {"": None}, ["user", "hi"], NESTED, [1, "a", None, {}],
    {"type": "image"}, {"type": "image", "image": "ok.png"}, {"type": "image_url", "image_url": {"url": {"url": 3}}},
    {"type": "text"}, {"type": "text", "text": None}, {"role": "user", "content": "hi"}, {"role": "assistant"},
    {"role": "assistant", "content": "x", "tool_calls": [3]}, {"from": [], "value": {}}, {"path": 3}, {"bytes": "x"},
    [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}], {"name": {}, "arguments": []},
]  # fmt: skip

plain = st.sampled_from(HOSTILE) | st.recursive(
    st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


def paths(value: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value inside."""
    yield prefix
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from paths(inner, (*prefix, step))


@st.composite
def mutated(draw: Any, bases: list[Any]) -> Any:
    """Draw one of the bases, with one to three values replaced, dropped, wrapped, moved or extended."""
    whole = [copy.deepcopy(draw(st.sampled_from(bases)))]
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in paths(whole) if path]))
        holder: Any = whole
        for step in path[:-1]:
            holder = holder[step]
        last = path[-1]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "wrap", "other"]))
        value = copy.deepcopy(draw(plain))
        if kind == "drop" and len(path) > 1:
            del holder[last]
        elif kind == "add" and isinstance(holder[last], dict):
            holder[last][draw(st.sampled_from(KEYS))] = value
        elif kind == "add" and isinstance(holder[last], list):
            holder[last].insert(draw(st.integers(0, len(holder[last]))), value)
        elif kind == "wrap":
            holder[last] = draw(st.sampled_from([[holder[last]], {"text": holder[last]}, {"a": [holder[last]]}]))
        elif kind == "other":
            other: Any = whole
            for step in draw(st.sampled_from([path for path in paths(whole) if path])):
                other = other[step]
            holder[last] = copy.deepcopy(other)
        else:
            holder[last] = value
    return whole[0]


PIECES = [
    b"", b"\x00", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\t", b"\r", b"\x85", b"\xe2\x80\xa8", b"{", b"}", b"[",
    b"]", b'"', b"'", b":", b": ", b",", b"\n", b"\n  ", b"- ", b"#", b"&a ", b"*a", b"<<: *a", b"!x ", b"? ", b"|",
    b">", b"%YAML 1.1\n---\n", b"---\n", b"...\n", b"NaN", b"Infinity", b"-", b"1e99999", b"9" * 5000, b"\\ud800",
    b"\\u0000", b'"a": 1, "a": 2,', b"[" * 2000, b"{" * 2000, b'{"a":' * 1500, b"- " * 2000, b"@", b"`",
    b"\xef\xbb\xbf",
]  # fmt: skip


@st.composite
def torn(draw: Any, whole: st.SearchStrategy[bytes]) -> bytes:
    """Draw the bytes, with up to three ranges of them replaced."""
    data = draw(whole)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([0, 0, 1, 2, 10, 200])))
        data = data[:start] + draw(st.sampled_from(PIECES) | st.binary(max_size=6)) + data[stop:]
    return data


def as_json(value: Any) -> bytes:
    """Encode as JSON in Python's way, which allows NaN and lone surrogates."""
    return json.dumps(value).encode()
