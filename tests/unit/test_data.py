"""Sources are validated row by row: errors name a file and a line, dropped rows are counted."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ernie_align.data.collate import Collator, RowEncoder
from ernie_align.data.load import encode_sample, encode_source, mix_sources
from ernie_align.data.preview import format_preview, preview_example
from ernie_align.data.render import IGNORE_INDEX
from ernie_align.data.sources import Source
from ernie_align.errors import DataError
from ernie_align.recipe import DataBlock, SourceBlock
from tests.support.runs import write_rows


def ask(question, reply, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}], **more}


def source_of(path, *, streaming=False, sample=None, media_root=None, **keys):
    block = SourceBlock(path=str(path), **keys)
    return Source(block, DataBlock(train=[block], media_root=media_root), streaming=streaming, sample=sample)


@pytest.fixture
def encode(renderers):
    return RowEncoder(renderers["vl_moe"], max_length=64)


ROWS = [ask("one plus two?", "three"), ask("two plus two?", "four"), ask("Is it odd?", "even")]


def write(path, kind):
    import pandas

    flat = [{"instruction": row["messages"][0]["content"], "output": row["messages"][1]["content"]} for row in ROWS]
    if kind == "jsonl":
        write_rows(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        pandas.DataFrame(ROWS).to_parquet(path)
    else:
        pandas.DataFrame(flat).to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, encode, kind):
    expected, _ = encode_sample(source_of(write(tmp_path / "expected.jsonl", "jsonl"), sample=9), encode)
    source = source_of(write(tmp_path / f"a.{kind}", kind))
    examples, count = encode_source(source, encode)
    assert source.format == ("alpaca" if kind in ("csv", "tsv") else "messages")
    assert examples["input_ids"][:] == [example["input_ids"] for example in expected]
    assert (count.rows, count.kept, count.examples, count.images) == (3, 3, 3, 0)


def test_rows_of_mixed_shape_in_one_file(tmp_path, encode, digits):
    """Text and parts as content, answers as numbers, missing keys, tools: cases that table readers usually reject."""
    rows = [
        ask([{"type": "image"}, {"type": "text", "text": "?"}], "two", images=["images/0001.png"], answer="two"),
        ask("one?", "one", answer=1),
        {**ask("f?", "one"), "tools": [{"name": "f", "parameters": {"x": {"type": "string"}}}]},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    examples, count = encode_source(source_of(path, media_root=str(digits)), encode)
    assert len(examples) == 3 and (count.images, count.vision_tokens) == (1, 6)
    sampled, sampled_count = encode_sample(source_of(path, media_root=str(digits), sample=3), encode)
    assert [example["input_ids"] for example in sampled] == examples["input_ids"][:] and sampled_count == count


def test_images_inside_a_table(tmp_path, encode, digits):
    """As on the hub: an Image feature, stored as bytes in Parquet."""
    import datasets

    pixels = [Image.open(digits / "images" / f"{number:04d}.png").copy() for number in range(2)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        }
    )
    rows = {"image": pixels, "messages": [ask("Which?", "two")["messages"]] * 2}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    examples, count = encode_source(source_of(tmp_path / "a.parquet"), encode)
    assert count.images == 2 and examples[0]["media"][0]["bytes"].startswith(b"\x89PNG")


def test_a_glob_names_several_files_and_limit_takes_the_first_rows(tmp_path, encode):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    examples, count = encode_source(source_of(tmp_path / "*.jsonl"), encode)
    assert len(examples) == 6
    _, count = encode_source(source_of(tmp_path / "*.jsonl", limit=4), encode)
    assert count.rows == 4


BROKEN = [
    (lambda path: None, "no such file", ""),
    (lambda path: path.write_text(""), "is empty", ""),
    (lambda path: path.write_text("\n\n"), "is empty|no rows|cannot be read", ""),
    (lambda path: path.write_text(json.dumps(ROWS[0]) + '\n{"messages": [\n'), "not JSON", ":2"),
    (lambda path: path.write_text(json.dumps(ROWS[0]) + "\n\n[1]\n"), "the row is not a JSON object", ":3"),
    (lambda path: write_rows(path, [{"foo": 1}]), "no known format has the columns foo", ":1"),
]


@pytest.mark.parametrize(("make", "says", "where"), BROKEN)
@pytest.mark.parametrize("sample", [None, 10])
def test_unusable_files_are_named_with_their_line(tmp_path, encode, make, says, where, sample):
    path = tmp_path / "a.jsonl"
    make(path)
    with pytest.raises(DataError, match=says) as caught:
        source = source_of(path, sample=sample)
        encode_sample(source, encode) if sample else encode_source(source, encode)
    (fault,) = caught.value.faults
    assert where == "" or fault.where == f"{path}{where}"


@pytest.mark.parametrize("sample", [None, 10])
def test_every_faulty_row_is_named_at_once(tmp_path, encode, digits, sample):
    for name, size in (("broken", (8, 8)), ("long", (1000, 2))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    noise = (digits / "images" / "0001.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(noise[: len(noise) // 2])
    rows = [
        ROWS[0],
        ask("?", " "),
        ask("?", "a", images=["none.png"]),
        ROWS[1],
        ask("?", "a", images=["broken.png"]),
        ask("?", "a", images=["long.png"]),
        ask([{"type": "image"}], "a"),
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        source = source_of(path, sample=sample)
        encode_sample(source, encode) if sample else encode_source(source, encode)
    faults = [(fault.where.removeprefix(f"{path}:"), fault.what) for fault in caught.value.faults]
    assert [line for line, _ in faults] == ["2", "3", "5", "6", "7"]
    for (_, what), says in zip(
        faults, ["empty answer", "no such image", "broken", "aspect ratio 500", "1 image parts for 0"], strict=True
    ):
        assert says in what
    assert all(fault.fix for fault in caught.value.faults)


def test_line_numbers_count_blank_lines(tmp_path, encode):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(ROWS[0]), "", json.dumps(ask("?", "")), ""]))
    with pytest.raises(DataError) as caught:
        encode_source(source_of(path), encode)
    assert caught.value.faults[0].where == f"{path}:3"


def test_long_rows_are_dropped_and_counted(tmp_path, encode):
    path = write_rows(tmp_path / "a.jsonl", [ROWS[0], ask("one plus " * 60, "two"), ROWS[1]])
    examples, count = encode_source(source_of(path), encode)
    assert len(examples) == 2 and count.dropped == {"over data.max_length 64": 1}
    assert [rows[1] for rows in examples["rows"][:]] == [0, 2]
    path = write_rows(tmp_path / "b.jsonl", [ask("one plus " * 60, "two")])
    with pytest.raises(DataError, match="every row was dropped"):
        encode_source(source_of(path), encode)


def test_a_weight_is_the_number_of_repeats_per_epoch(tmp_path, encode):
    sources = [source_of(write_rows(tmp_path / f"{name}.jsonl", ROWS * 4)) for name in "ab"]
    prepared = [encode_source(source, encode, number=number)[0] for number, source in enumerate(sources)]

    def rows(seed, *weights):
        blocks = [
            source.block.model_copy(update={"weight": weight}) for source, weight in zip(sources, weights, strict=True)
        ]
        return [tuple(row) for row in mix_sources(prepared, blocks, seed=seed)["rows"][:]]

    mixed = rows(0, 2.0, 0.5)
    assert sorted(mixed).count((0, 3)) == 2 and len(mixed) == 24 + 6
    assert len({row for row in mixed if row[0] == 1}) == 6
    assert rows(0, 2.0, 0.5) == mixed != rows(1, 2.0, 0.5)


def test_untrained_reasoning_is_counted(tmp_path, encode):
    turn = {"role": "assistant", "content": "two", "reasoning_content": "one and one"}
    rows = [{"messages": [{"role": "user", "content": "?"}, turn]}, {**ROWS[0]}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    for _, count in (encode_source(source_of(path), encode), encode_sample(source_of(path, sample=9), encode)):
        assert (count.reasoning_left_out, count.without_images, count.examples) == (1, 2, 2)
    encode.renderer.thinking = True
    path = write_rows(tmp_path / "b.jsonl", rows[:1])
    assert encode_source(source_of(path), encode)[1].reasoning_left_out == 0


def test_several_images_inside_a_table(tmp_path, encode, digits):
    import datasets

    pixels = [Image.open(digits / "images" / f"{number:04d}.png").copy() for number in range(2)]
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(turn)})
    rows = {"images": [pixels, pixels[:1]], "messages": [ask("Which?", "two")["messages"]] * 2}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    examples, count = encode_source(source_of(tmp_path / "a.parquet"), encode)
    assert count.images == 3 and [len(media) for media in examples["media"][:]] == [2, 1]


def test_streams_give_the_same_examples(tmp_path, encode):
    path = write_rows(tmp_path / "a.jsonl", [*ROWS, ask("one plus " * 60, "two")])
    whole, _ = encode_source(source_of(path), encode)
    stream, count = encode_source(source_of(path, streaming=True), encode)
    assert [example["input_ids"] for example in stream] == whole["input_ids"][:]
    assert (count.rows, count.kept, sum(count.dropped.values())) == (4, 3, 1)
    bad = write_rows(tmp_path / "b.jsonl", [*ROWS, ask("?", "")])
    with pytest.raises(DataError, match="an empty answer") as caught:
        list(encode_source(source_of(bad, streaming=True), encode)[0])
    assert caught.value.faults[0].where == f"{bad}:4"


def test_workers_share_the_work(tmp_path, encode):
    path = write_rows(tmp_path / "a.jsonl", ROWS * 50)
    alone, count = encode_source(source_of(path), encode)
    together, shared = encode_source(source_of(path), encode, workers=2, cache=tmp_path / "cache.arrow")
    assert alone["input_ids"][:] == together["input_ids"][:] and count == shared


def test_a_batch_contains_its_rows(renderers, checkpoints, digits):
    from ernie_align.models.pixels import load_image_processor

    encode = RowEncoder(renderers["vl_moe"], max_length=128)
    examples, _ = encode_sample(source_of(digits / "train.jsonl", sample=100), encode)
    examples = [example | {"rows": [0, number]} for number, example in enumerate(examples)]
    by_images = {len(example["media"]): example for example in examples}
    chosen = [by_images[count] for count in (1, 0, 2)]
    for left in (False, True):
        collate = Collator(0, image_processor=load_image_processor(str(checkpoints["vl_moe"])), left=left)
        batch = collate(chosen)
        for row, example in enumerate(chosen):
            mask = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][mask].tolist() == example["input_ids"]
            assert batch["labels"][row][mask].tolist() == example["labels"]
            assert (batch["labels"][row][~mask] == IGNORE_INDEX).all()
            assert mask[-1 if left else 0]
        assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * sum(len(example["media"]) for example in chosen)
        assert batch["pixel_values"].shape[0] == 16 * len(batch["image_grid_thw"])
    text = [example for example in chosen if not example["media"]]
    assert "pixel_values" not in collate(text)


def test_an_image_that_breaks_after_validation_names_its_row(renderers, tmp_path, digits):
    image = tmp_path / "a.png"
    image.write_bytes((digits / "images" / "0000.png").read_bytes())
    path = write_rows(tmp_path / "a.jsonl", [ROWS[0], ask("?", "two", images=["a.png"])])
    source = source_of(path)
    examples, _ = encode_source(source, RowEncoder(renderers["vl_moe"], max_length=64))
    image.unlink()
    with pytest.raises(DataError, match="no such image") as caught:
        Collator(0, row_name=lambda _, row: source.row_name(row))(list(examples))
    assert caught.value.faults[0].where == f"{path}:2"


def test_the_preview_shows_token_label_and_pool(renderers, digits):
    examples, _ = encode_sample(
        source_of(digits / "parity_test.jsonl", sample=1), RowEncoder(renderers["vl_moe"], max_length=64)
    )
    spans = preview_example(examples[0], renderers["vl_moe"])["example"]
    vision = [(span.text, span.repeat) for span in spans if span.pool == "vision"]
    assert vision == [("<|IMAGE_START|>", 1), ("<|IMAGE_PLACEHOLDER|>", 4), ("<|IMAGE_END|>", 1)]
    assert [span.text for span in spans if span.trained][-1] == "<|end_of_sentence|>"
    lines = format_preview({"example": spans}).splitlines()
    assert lines[1].split() == ["token", "trained", "pool"] and lines[-1].split()[-2:] == ["trained", "text"]
