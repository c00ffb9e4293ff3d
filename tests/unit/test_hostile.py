"""Any recipe and any row is accepted or refused with its place: without a traceback, a hang or access to other files.

FUZZ=recipes,rows sets how many of each are drawn, as in FUZZ=5000,10000; always the same ones.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import tracemalloc
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ernie_align.data.collate import RowEncoder
from ernie_align.data.load import encode_source
from ernie_align.data.pairs import PairEncoder
from ernie_align.data.prompts import PromptEncoder
from ernie_align.data.row import RowFault
from ernie_align.data.sources import Source
from ernie_align.dataset_report.inspect_sources import RowInspector
from ernie_align.errors import AlignError, DataError, Fault, RecipeError
from ernie_align.recipe import DataBlock, SourceBlock, to_yaml
from ernie_align.runs import load_recipe
from tests.support.fuzz import as_json, mutated, torn
from tests.support.runs import ROOT

RECIPES, ROWS = map(int, os.environ.get("FUZZ", "150,300").split(","))
SECONDS = 20  # for one recipe or row; on two cores the slowest takes under one
SHIPPED = [path.read_text() for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name != "eval"]


def fuzzed(number):
    """Return settings that draw the same examples each time."""
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
    """Fail if a file outside the folders and Python's own is opened, a connection made or a program started."""
    global _opened
    _opened = []
    allowed = tuple(map(str, (*folders, sys.prefix, sys.base_prefix, ROOT / "ernie_align")))
    try:
        yield
    finally:
        opened, _opened = _opened, None
    outside = [path for path in opened if not os.path.realpath(path).startswith(allowed)]
    assert not outside, outside


# -- recipes ----------------------------------------------------------------------------------------------------------


recipes = mutated([yaml.safe_load(text) for text in SHIPPED])
recipe_texts = (
    torn(st.sampled_from([text.encode() for text in SHIPPED]))
    | recipes.map(lambda values: yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))
    | torn(recipes.map(as_json))
)


@fuzzed(RECIPES)
@given(recipe_texts)
def test_any_recipe_is_accepted_or_refused_with_its_place(tmp_path_factory, text):
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
    """Make a folder with an image, and with files that only look like one."""
    folder = tmp_path_factory.mktemp("hostile")
    Image.new("RGB", (60, 60)).save(folder / "ok.png")
    (folder / "broken.png").write_bytes((folder / "ok.png").read_bytes()[:60])
    header = b"IHDR" + struct.pack(">IIBBBBB", 40000, 30000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + b"\0" * 8)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture(scope="session")
def encoders(checkpoints):
    """Make the encoders: (family, name) -> encoder."""
    from ernie_align.data.render import make_renderer
    from ernie_align.models.checkpoint_files import CheckpointFiles
    from ernie_align.models.pixels import ImageSizes
    from ernie_align.models.routing import ModalityTokens

    made = {}
    for family in ("dense", "vl_moe"):
        files = CheckpointFiles(str(checkpoints[family]))
        modality = ModalityTokens.from_config(files.read_json("config.json"))
        renderer = make_renderer(files.tokenizer(), modality, ImageSizes())
        made[family, "answers"] = RowEncoder(renderer, max_length=64, cut=True)
        made[family, "pairs"] = PairEncoder(renderer, max_length=64, cut=True)
        made[family, "prompts"] = PromptEncoder(renderer, max_length=64, cut=True)
    return made


def _encoder_name(format):
    pairs = "preference" in format or format == "ultrafeedback"
    return "pairs" if pairs else "prompts" if format == "prompt" else "answers"


def lines_of(format):
    rows = mutated(BASES[format])
    plain = rows.map(as_json)
    return plain | plain | torn(plain)


@fuzzed(max(1, ROWS // len(BASES)))
@given(data=st.data())
@pytest.mark.parametrize("format", BASES)
def test_any_row_is_accepted_or_refused_with_its_place(format, media_folder, encoders, data):
    line = data.draw(lines_of(format)).replace(b"\n", b" ") + b"\n"
    names = {_encoder_name(format), "prompts" if _encoder_name(format) == "answers" else _encoder_name(format)}
    encode = encoders[data.draw(st.sampled_from(("dense", "vl_moe"))), data.draw(st.sampled_from(sorted(names)))]
    assert faulty_places(line, format, media_folder, encode) in ([], [f"{media_folder / 'rows.jsonl'}:1"])


def faulty_places(line, format, folder, encode):
    """Return the places of faulty rows."""
    path = folder / "rows.jsonl"
    path.write_bytes(line)
    block = SourceBlock(path=str(path), format=format)
    with at_most(SECONDS), opening_only(folder):
        try:
            reader = RowInspector(Source(block, DataBlock(train=[block])), encode)
        except AlignError as error:
            return [fault.where for fault in error.faults]
        rows = len(reader.source.rows)
        report = reader.inspect(0, rows)
    assert report.count.rows == rows
    named = [named for reason in report.faults.values() for named in reason.named]
    assert all(what and kind for kind in report.faults for _, what, _ in report.faults[kind].named)
    return [row for row, _, _ in named]


# -- cases that fuzzing found -----------------------------------------------------------------------------------------

GOOD = "stage: sft\nmodel: {name: a/b}\ndata: {train: [{path: x.jsonl}]}\nrun: {dir: runs/x}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FOUND = {
    "a list as the stage": GOOD.replace("sft", "[sft]"),
    "deep lists": GOOD + "x: " + "[" * 5000,
    "deep mappings": GOOD + "x: " + "{a: " * 5000,
    "deep dashes": "- " * 5000,
    "an alias bomb": GOOD + BOMB,
    "an alias of itself": GOOD + "x: &x [*x]\n",
    "a number of 5000 digits": GOOD.replace("runs/x}", "runs/x, seed: " + "9" * 5000 + "}"),
    "NUL in a path": GOOD.replace("x.jsonl", '"x\\0.jsonl"'),
    "half of a character": GOOD.replace("runs/x", '"runs/\\ud800"'),
    "not a number": GOOD + "training: {learning_rate: .nan}\n",
    "an endless weight": GOOD.replace("x.jsonl", "x.jsonl, weight: .inf"),
    "tabs": GOOD.replace("model:", "\tmodel:"),
    "bytes that are no UTF-8": GOOD.encode() + b"\xff\xfe\n",
    "a key twice": GOOD + "stage: lora\n",
    "nothing": "",
}


@pytest.mark.parametrize("name", FOUND)
def test_recipes_that_failed_once_are_refused_with_their_place(name, tmp_path):
    text, path = FOUND[name], tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with at_most(10), pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert all(fault.where.startswith(str(path)) for fault in caught.value.faults)


def test_an_endless_recipe_is_not_read_to_its_end(tmp_path):
    with at_most(10), pytest.raises(RecipeError, match="over 4,194,304 bytes"):
        load_recipe("/dev/zero")
    pipe = tmp_path / "reward.py"
    os.mkfifo(pipe)
    recipe = yaml.safe_load((ROOT / "recipes/demo/digits_upo.yaml").read_text())
    recipe["rewards"] = [{"name": f"{pipe}:pay"}]
    with at_most(10), pytest.raises(RecipeError, match="not a regular file"):
        load_recipe(recipe)


ROWS_MENDED = [
    ("messages", {"messages": 3}),
    ("messages", {"messages": []}),
    ("messages", {"messages": [{"role": "user", "content": ["hi"]}, REPLY]}),
    ("messages", {"messages": [REPLY]}),
    ("messages", {"messages": [USER, REPLY], "tools": 3}),
    ("messages", {"messages": [USER, REPLY], "tools": "[" * 100_000}),
    ("messages", {"messages": [USER, REPLY], "chat_template_kwargs": "x"}),
    ("messages", {"messages": [USER, {**REPLY, "reasoning_content": 3}]}),
    ("messages", {"messages": [USER, {"role": "assistant", "tool_calls": [3]}, REPLY]}),
    ("messages", {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": {}}]}, REPLY]}),
    ("messages", {"messages": [USER, REPLY] * 600}),
    ("prompt_completion", {"prompt": [["user", "hi"]], "completion": [REPLY]}),
    ("prompt_completion", {"prompt": [], "completion": [REPLY]}),
    ("sharegpt", {"conversations": ["hi"]}),
    ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "a"}]}),
    ("alpaca", {"instruction": ["a"], "output": "b"}),
    ("alpaca", {"instruction": "a", "output": "b", "history": [3]}),
    ("erniekit", {"src": 3, "tgt": "b"}),
    ("erniekit", {"src": ["a"], "tgt": ["b"], "label": True}),
    ("erniekit_vl", {"text_info": ["a"]}),
    ("erniekit_vl", {"text_info": [{"text": "a", "tag": []}]}),
    ("erniekit_vl", {"text_info": [{"text": "a", "tag": "mask"}], "image_info": [None]}),
    ("preference", {"prompt": 3, "chosen": "a", "rejected": "b"}),
    ("sharegpt_preference", {"conversations": [USER], "chosen": 3, "rejected": "b"}),
    ("alpaca_preference", {"question": ["a"], "chosen": "b", "rejected": "c"}),
    ("alpaca_preference", {"question": "a", "chosen": "b", "rejected": "c", "history": ["x"]}),
    ("erniekit_preference", {"src": ["a"], "response": 3, "sort": [1, 0]}),
    ("erniekit_preference", {"src": ["a"], "response": ["b", "c"], "sort": [1, 10**400]}),
    ("ultrafeedback", {"instruction": "a", "completions": [None]}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": {"role": "user"}}),
    ("prompt", {"prompt": 3}),
]


@pytest.mark.parametrize(("format", "row"), ROWS_MENDED, ids=lambda value: value if isinstance(value, str) else "")
def test_rows_that_failed_once_are_refused_with_their_place(format, row, media_folder, encoders):
    encode = encoders["vl_moe", _encoder_name(format)]
    assert faulty_places(as_json(row) + b"\n", format, media_folder, encode) == [f"{media_folder / 'rows.jsonl'}:1"]


LINES = {
    b'{"prompt": "a", "prompt": "b"}': "duplicate key",
    b'{"prompt": NaN}': "NaN is not valid JSON",
    b'{"prompt": "\\ud800"}': "half of a character",
    b'{"prompt": "\xff"}': "not UTF-8",
    b'{"prompt": ' + b"9" * 5000 + b"}": "not JSON",
    b'{"prompt": ' + b"[" * 100_000: "nested too deeply|not JSON",
    b"[1]": "the row is not a JSON object",
    b'"x"': "the row is not a JSON object",
    b'{"prompt": "a"': "not JSON",
}


@pytest.mark.parametrize("line", LINES, ids=LINES.values())
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_ambiguous_json_is_refused(line, kind, tmp_path, encoders):
    path, good = tmp_path / f"rows.{kind}", b'{"prompt": "one?"}'
    path.write_bytes(b"\n".join([good, b"", line, good]) if kind == "jsonl" else b"[\n" + good + b",\n" + line + b"]")
    block = SourceBlock(path=str(path), format="prompt")
    with pytest.raises(DataError, match=LINES[line]) as caught:
        encode_source(Source(block, DataBlock(train=[block])), encoders["dense", "prompts"])
    assert caught.value.faults[0].where in (f"{path}:3", f"{path}:4", str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "not JSON"),
        ('[{"prompt": "a"}', "the list is not closed|comma"),
        ('[{"prompt": "a"},]', "without a row after it"),
        ('[{"prompt": "a"}] 3', "text after the list"),
        ('[{"prompt": "a"} {"prompt": "a"}]', "a comma"),
        ('{"prompt": "a"} {"prompt": ', "not JSON"),
    ],
)
def test_an_incomplete_list_of_rows_is_refused_with_its_line(text, says, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n" + text)
    block = SourceBlock(path=str(path))
    with pytest.raises(DataError, match=says) as caught:
        Source(block, DataBlock(train=[block]))
    assert caught.value.faults[0].where == f"{path}:2"


def test_rows_of_a_list_are_named_by_their_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff[{"prompt": "é"},\n\n  {"prompt":\n "b"}, {"prompt": "\U0001d54f"}]\n')
    block = SourceBlock(path=str(path))
    source = Source(block, DataBlock(train=[block]))
    assert [source.read(raw)["prompt"] for raw in source.rows] == ["é", "b", "\U0001d54f"]
    assert [source.row_name(number) for number in range(3)] == [f"{path}:1", f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv"])
def test_broken_tables_are_named(kind, tmp_path):
    import pandas

    table = pandas.DataFrame({"prompt": ["a", "b"] * 50, "answer": ["c"] * 100})
    path = tmp_path / f"rows.{kind}"
    table.to_parquet(path) if kind == "parquet" else table.to_csv(path, index=False)
    data = path.read_bytes()
    torn_up = [data[:30], data[:-10], b"\0" * 100, b"\xff" * 100, b'a,b\n1,2,3\n"x']
    for number, piece in enumerate(torn_up):
        path = tmp_path / f"torn{number}.{kind}"
        path.write_bytes(piece)
        block = SourceBlock(path=str(path))
        try:
            source = Source(block, DataBlock(train=[block]))
            for raw in source.rows:
                source.row(source.read(raw))
        except DataError as error:
            assert error.faults[0].what and error.faults[0].where
        except RowFault:
            pass  # it is a readable table, with other rows


def test_an_endless_row_is_refused_without_being_held(tmp_path):
    from ernie_align.data import json_rows

    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "one?"}\n')
        file.truncate(64 << 20)  # the rest is one line of zeros, a hole that takes no space on disk
    tracemalloc.start()
    first, second = json_rows.find_rows([str(path)])
    with pytest.raises(RowFault, match="is over the limit of 5,242,880"):
        json_rows.read_row(str(path), second, max_bytes=5 << 20)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20 and first.line == 1 and second.line == 2
    tracemalloc.stop()


def test_a_file_that_changes_between_indexing_and_reading_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one?"}\n{"prompt": "two?"}\n')
    block = SourceBlock(path=str(path))
    source = Source(block, DataBlock(train=[block]))
    path.write_text('{"prompt": "o"}\n')
    with pytest.raises(RowFault):
        source.read(source.rows[1])
    path.unlink()
    with pytest.raises(RowFault, match="cannot be read"):
        source.read(source.rows[1])


def test_control_characters_of_a_row_do_not_reach_the_terminal():
    fault = Fault("rows.jsonl:1", "role '\x1b[2J\x07\ud800'")
    assert "\x1b" not in str(fault) and "\x07" not in str(fault)
    str(fault).encode()
