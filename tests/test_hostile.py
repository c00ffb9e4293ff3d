"""Whatever a recipe or a row holds, it is taken or refused with its place: no traceback, no wait, no foreign file.

FUZZ=recipes,rows sets how many of each are drawn, as in FUZZ=5000,10000; always the same ones.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ernie_align.data.collate import RowEncoder
from ernie_align.data.load import SourceCount
from ernie_align.data.pairs import PairEncoder
from ernie_align.data.prompts import PromptEncoder
from ernie_align.data.sources import Source
from ernie_align.doctor.findings import Findings
from ernie_align.doctor.reading import Reader
from ernie_align.errors import AlignError, RecipeError
from ernie_align.recipe import DataBlock, SourceBlock, to_yaml
from ernie_align.runs import load_recipe
from tests.conftest import ROOT
from tests.fuzz.values import as_json, mutated, torn

RECIPES, ROWS = map(int, os.environ.get("FUZZ", "150,300").split(","))
SECONDS = 20  # for one recipe or row; on two cores the slowest takes under one
SHIPPED = [path.read_text() for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name != "eval"]


def fuzzed(number):
    """The same examples each time; the plain draw, because a failure is mended from its first example."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@contextmanager
def at_most(seconds):
    def stop(*_):
        raise AssertionError(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_opened: list[str] | None = None


def _hook(event, arguments):
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes, Path)):
        _opened.append(os.fsdecode(arguments[0]))
    if event in ("socket.connect", "subprocess.Popen", "os.system") and _opened is not None:
        _opened.append(f"{event} {arguments}")


sys.addaudithook(_hook)


@contextmanager
def opening_only(*folders):
    """No file but those in the folders and Python's own is opened, no connection made, no program started."""
    global _opened
    _opened = []
    allowed = tuple(map(str, (*folders, sys.prefix, sys.base_prefix, ROOT / "ernie_align")))
    try:
        yield
    finally:
        opened, _opened = _opened, None
    foreign = [path for path in opened if not os.path.realpath(path).startswith(allowed)]
    assert not foreign, foreign


# -- recipes ----------------------------------------------------------------------------------------------------------


recipes = mutated([yaml.safe_load(text) for text in SHIPPED])
recipe_texts = (
    torn(st.sampled_from([text.encode() for text in SHIPPED]))
    | recipes.map(lambda values: yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))
    | torn(recipes.map(as_json))
)


@fuzzed(RECIPES)
@given(recipe_texts)
def test_any_recipe_is_taken_or_refused_with_its_place(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text)
    with at_most(SECONDS), opening_only(path.parent):
        try:
            to_yaml(load_recipe(path))
        except RecipeError as error:
            for fault in error.faults:
                assert fault.where.startswith(str(path)) and fault.what, fault
            str(error).encode("utf-8", "backslashreplace")


# -- rows -------------------------------------------------------------------------------------------------------------

USER, REPLY = {"role": "user", "content": "one plus two?"}, {"role": "assistant", "content": "three"}
SEEN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
BASES = {
    "messages": [
        {"messages": [USER, REPLY], "kind": "k"},
        {"messages": [SEEN, REPLY], "images": ["ok.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "ok.png"}]}, REPLY]},
        {"messages": [USER, CALL, {"role": "tool", "content": "3"}, REPLY], "tools": TOOLS, "thinking": False},
        {"messages": [USER, {**REPLY, "reasoning_content": "1, 2"}], "chat_template_kwargs": {"enable_thinking": True}},
    ],
    "prompt_completion": [
        {"prompt": "one", "completion": " two"},
        {"prompt": [USER], "completion": [REPLY]},
        {"prompt": [SEEN], "completion": [REPLY], "images": ["ok.png"]},
    ],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}],
            "images": ["ok.png"],
        },
        {
            "conversations": [
                {"from": "human", "value": "?"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "three"},
            ],
            "tools": "[]",
            "system": "S",
        },
    ],
    "alpaca": [{"instruction": "Add.", "input": "1", "output": "2", "history": [["a", "b"]], "system": "S"}],
    "erniekit": [{"src": ["a", "b"], "tgt": ["c", "d"], "label": [0, 1], "system": "S"}, {"src": "a", "tgt": "b"}],
    "erniekit_vl": [
        {
            "text_info": [{"text": "Which?", "tag": "mask"}, {"text": "two", "tag": "no_mask"}],
            "image_info": [{"matched_text_index": 0, "image_url": "ok.png"}],
        }
    ],
    "preference": [
        {"prompt": [USER], "chosen": [REPLY], "rejected": [{**REPLY, "content": "four"}]},
        {"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "four"}]},
        {"prompt": "one plus", "chosen": " two", "rejected": " three"},
        {"chosen": "one plus two", "rejected": "one plus three"},
    ],
    "sharegpt_preference": [
        {
            "conversations": [{"from": "human", "value": "?"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        }
    ],
    "alpaca_preference": [
        {"question": "one?", "input": "", "chosen": "two", "rejected": "three", "history": [["a", "b"]], "system": "S"}
    ],
    "erniekit_preference": [{"src": ["a", "b"], "tgt": ["c"], "response": ["d", ["e", "f", "g"]], "sort": [1, 0]}],
    "ultrafeedback": [
        {"instruction": "?", "completions": [{"response": "a", "score": 1}, {"text": "b", "overall_score": 2.5}]}
    ],
    "prompt": [{"prompt": "one?", "answer": "two"}, {"prompt": [SEEN], "images": ["ok.png"], "kind": "k"}],
}


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory):
    """A folder with an image, and with what only looks like one."""
    folder = tmp_path_factory.mktemp("hostile")
    Image.new("RGB", (60, 60)).save(folder / "ok.png")
    (folder / "broken.png").write_bytes((folder / "ok.png").read_bytes()[:60])
    header = b"IHDR" + struct.pack(">IIBBBBB", 40000, 30000, 8, 2, 0, 0, 0)
    said = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + said + b"\0\0\0\0IDAT" + b"\0" * 8)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture(scope="session")
def encoders(checkpoints):
    """(family, encoder name) -> encoder. The thinking template of the family is the checkpoint's own."""
    from ernie_align.evaluation.generate import make_renderer
    from ernie_align.models.files import CheckpointFiles
    from ernie_align.models.modality import ModalityTokens
    from ernie_align.models.pixels import ImageSizes

    made = {}
    for family in ("dense", "vl_moe"):
        files = CheckpointFiles(str(checkpoints[family]))
        modality = ModalityTokens.from_config(files.read_json("config.json"))
        renderer = make_renderer(files.tokenizer(), modality, ImageSizes())
        made[family, "answers"] = RowEncoder(renderer, max_length=64, cut=True)
        made[family, "pairs"] = PairEncoder(renderer, max_length=64, cut=True)
        made[family, "prompts"] = PromptEncoder(renderer, max_length=64, cut=True)
    return made


def lines_of(format):
    rows = mutated(BASES[format])
    plain = rows.map(as_json)
    return plain | plain | torn(plain)


@fuzzed(max(1, ROWS // len(BASES)))
@given(data=st.data())
@pytest.mark.parametrize("format", BASES)
def test_any_row_is_taken_or_refused_with_its_place(format, media_folder, encoders, data):
    line = data.draw(lines_of(format)).replace(b"\n", b" ") + b"\n"
    names = ("pairs",) if "preference" in format or format == "ultrafeedback" else ("answers", "prompts")
    encode = encoders[data.draw(st.sampled_from(("dense", "vl_moe"))), data.draw(st.sampled_from(names))]
    assert judged(line, format, media_folder, encode) in ([], [f"{media_folder / 'rows.jsonl'}:1"])


def judged(line, format, folder, encode):
    """The places of faults."""
    path = folder / "rows.jsonl"
    path.write_bytes(line)
    block = SourceBlock(path=str(path), format=format)
    with at_most(SECONDS), opening_only(folder):
        try:
            reader = Reader(Source(block, DataBlock(train=[block])), encode)
        except AlignError as error:
            return [fault.where for fault in error.faults]
        rows = len(reader.source.rows)
        found = reader.rows(0, rows, Findings("train", SourceCount("rows"), encode.max_length))
    assert found.count.rows == rows
    named = [named for reason in found.faults.values() for named in reason.named]
    assert all(what and kind for kind in found.faults for _, what, _ in found.faults[kind].named)
    return [row for row, _, _ in named]
