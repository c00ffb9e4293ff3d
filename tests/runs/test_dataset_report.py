"""The dataset report reads every row as training would, does not stop at faults, and keeps only counts."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from ernie_align.cli import app
from ernie_align.dataset_report import Histogram
from ernie_align.dataset_report.inspect_sources import letters_by_script
from ernie_align.runs import check_data, load_recipe, prepare_data, set_up
from tests.support.runs import recipe_of, write_rows

SMALL = {"scopes": ["attention"], "rank": 4, "alpha": 8}


def ask(question, reply, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}], **more}


def data_check(recipe, *arguments):
    return CliRunner().invoke(app, ["data", "doctor", str(recipe), *map(str, arguments)], catch_exceptions=False)


def make_report(stage, model, path, tmp_path, workers=1, **blocks):
    report = check_data(load_recipe(recipe_of(stage, model, path, tmp_path / "run", **blocks)), workers=workers)
    return report, report.sources[0]


@pytest.fixture
def mixed(tmp_path, digits):
    """Return the path of a file with valid rows and rows of every kind of fault."""
    for number in range(3):
        image = Image.open(digits / "images" / f"{number:04d}.png")
        image.resize((40 * number + 56, 56)).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    rows = [
        ask("Which?", "two", images=["0.png"]),
        ask("Which?", " "),  # line 2: empty
        ask("Which are they?", "two", images=["1.png", "2.png"]),
        ask("Which?", "a", images=["none.png"]),  # 4: missing
        ask("Which?", "a", images=["broken.png"]),  # 5: broken
        ask([{"type": "image"}], "a"),  # 6: a placeholder without an image
        ask("one plus two?", "<think>\none and two\n</think>\nthree"),
        ask("one plus two?", "<think>\none and two\n</think>\nthree"),
        ask("one plus two?", "four"),
        ask("eins plus zwei, один плюс два, 一加二", "three"),
        ask("one plus " * 60, "two"),  # 11: too long
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with path.open("a") as file:
        file.write('{"messages": [\n[1]\n' + json.dumps(ask("one?", "one")) + "\n")  # 12, 13: not JSON, not an object
    return path


def test_every_faulty_row_is_found_and_none_stops_it(mixed, checkpoints, tmp_path):
    _, found = make_report("sft", checkpoints["vl_moe"], mixed, tmp_path, data={"max_length": 64})
    lines = {int(row.rsplit(":", 1)[1]): kind for kind, reason in found.faults.items() for row, _, _ in reason.named}
    assert lines == {
        2: "an empty answer",
        4: "a missing image",
        5: "a broken image",
        6: "image parts and images differ",
        12: "not JSON",
        13: "the row is not a JSON object",
    }
    assert (found.count.rows, found.count.kept, found.faulty, found.sound) == (14, 7, 6, False)
    assert found.count.dropped_rows == {"over data.max_length 64": [f"{mixed}:11"]}
    assert (found.empty_answers, found.bad_images, found.unplaced_images, found.equal_sides) == (1, 2, 1, 0)
    assert (found.duplicate_prompts, found.duplicate_rows) == (2, 1)  # of lines 7, 8 and 9
    assert (found.thinking, found.answered) == (2, 10)  # every row that could be converted
    assert (found.images_in_row.count, found.images_in_row.most, found.image_tokens.count) == (8, 2, 3)
    assert (found.widths.least, found.widths.most, found.heights.most) == (56, 136, 56)
    assert (found.aspects.least, found.aspects.most) == (100, 243)
    assert {"Latin", "Cyrillic", "Han"} == found.letters.keys() and found.letters["Han"] == 3


def limited_length(example):
    """Return the length that max_length limits: of a pair, the prompt with the longer answer."""
    if "input_ids" in example:
        return len(example["input_ids"])
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


@pytest.mark.parametrize("stage", ["sft", "dpo", "upo"])
def test_counts_and_lengths_are_those_of_training(stage, checkpoints, digits, tmp_path):
    """With each encoder: answers, pairs, and prompts with offline pairs; text and images."""
    pairs = {"path": str(digits / "preferences.jsonl"), "limit": 300}
    more = {
        "rewards": [{"name": "exact_match", "column": "answer"}],
        "adapter": SMALL,
        "upo": {"pairs": "dataset", "pairs_data": [pairs], "num_generations": 4, "max_completion_length": 8},
    }
    name = {"sft": "train.jsonl", "dpo": "preferences.jsonl", "upo": "prompts.jsonl"}[stage]
    data = {"train": [{"path": str(digits / name), "limit": 300}], "max_length": 32 if stage == "upo" else 40}
    values = recipe_of(stage, checkpoints["vl_moe"], digits, tmp_path / "run", data=data)
    recipe = load_recipe(values | (more if stage == "upo" else {}))
    sources = check_data(recipe, workers=1).sources
    prepared = prepare_data(set_up(recipe))
    assert [found.count for found in sources] == prepared.counts
    examples = [prepared.train, *prepared.extra.values()]
    assert len(sources) == len(examples) == (2 if stage == "upo" else 1)
    for found, kept in zip(sources, examples, strict=True):
        limit, dropped = found.max_length, sum(found.count.dropped.values())
        assert limit == (32 if (stage, found.part) == ("upo", "train") else 40)  # offline pairs include a completion
        assert found.over[limit][0] == dropped and found.lengths.count == 300 and found.count.kept == len(kept) > 0
        lengths = sorted(map(limited_length, kept))
        # below 128 each bin is one length
        bins = [length for length, number in sorted(found.lengths.bins.items()) for _ in range(number)]
        assert bins[: len(kept)] == lengths and all(limit < length < 128 for length in bins[len(kept) :])
        assert dropped > 0 or (stage, found.part) == ("upo", "train")  # prompts without answers are short


def test_the_cost_of_a_limit_is_what_training_drops(mixed, checkpoints, tmp_path):
    rows = write_rows(tmp_path / "sound.jsonl", [ask("one plus " * number, "two") for number in range(1, 120)])
    found, source = make_report("sft", checkpoints["dense"], rows, tmp_path, data={"max_length": 100})
    assert not found.has_vision
    for limit in (100, 512):
        recipe = load_recipe(recipe_of("sft", checkpoints["dense"], rows, tmp_path / "run", data={"max_length": limit}))
        (count,) = prepare_data(set_up(recipe)).counts
        assert source.over[limit][0] == sum(count.dropped.values())
        assert source.lengths.total - source.over[limit][1] == count.tokens


def test_cut_rows_are_counted_as_training_counts_them(checkpoints, tmp_path):
    turns = [{"role": role, "content": "one plus two"} for _ in range(12) for role in ("user", "assistant")]
    rows = write_rows(tmp_path / "a.jsonl", [{"messages": turns}, ask("one?", "one"), ask("one plus " * 60, "two")])
    data = {"max_length": 50, "overlong": "cut"}
    _, found = make_report("sft", checkpoints["dense"], rows, tmp_path, data=data)
    recipe = load_recipe(recipe_of("sft", checkpoints["dense"], rows, tmp_path / "run", data=data))
    assert [found.count] == prepare_data(set_up(recipe)).counts and found.count.cut == 1
    assert found.lengths.most > 100 and found.over[50][0] == 2


def test_several_workers_give_the_same_report(mixed, checkpoints, tmp_path):
    mixed.write_text(mixed.read_text() * 60)
    reports = []
    for workers in (1, 3):
        found, _ = make_report("sft", checkpoints["vl_moe"], mixed, tmp_path, workers=workers, data={"max_length": 64})
        reports.append({**found.as_json(), "seconds": 0, "workers": 0})
    assert reports[0] == reports[1] and reports[0]["sources"][0]["count"]["rows"] == 14 * 60
    reason = reports[0]["sources"][0]["faults"]["a broken image"]
    assert reason["rows"] == 60 and len(reason["named"]) == 20
    assert [named["row"] for named in reason["named"][:2]] == [f"{mixed}:5", f"{mixed}:19"]


def test_pairs_without_a_signal_are_counted(checkpoints, tmp_path):
    pair = {"prompt": [{"role": "user", "content": "one?"}]}

    def sides(chosen, rejected):
        return pair | {
            name: [{"role": "assistant", "content": text}]
            for name, text in (("chosen", chosen), ("rejected", rejected))
        }

    rows = write_rows(tmp_path / "a.jsonl", [sides("one", "two"), sides("one", "one"), sides("one", "")])
    _, found = make_report("dpo", checkpoints["dense"], rows, tmp_path)
    assert (found.equal_sides, found.empty_answers, found.faulty) == (1, 1, 2)
    _, found = make_report("dpo", checkpoints["dense"], rows, tmp_path, dpo={"bad_pairs": "drop"})
    assert (found.equal_sides, found.empty_answers, found.faulty, found.count.kept) == (1, 1, 0, 1) and found.sound


def test_held_out_prompts_that_are_also_trained_on(checkpoints, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [ask("one?", "one"), ask("two?", "two")])
    held = write_rows(tmp_path / "held.jsonl", [ask("two?", "two"), ask("three?", "three"), ask("one?", "three")])
    found, first = make_report("sft", checkpoints["dense"], train, tmp_path, data={"eval": [{"path": str(held)}]})
    assert [one.also_in_train for one in found.sources] == [None, 2] and first.duplicate_prompts == 0


def test_the_command_writes_tables_json_and_a_page(mixed, checkpoints, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    data = {"eval": [{"path": str(tmp_path / "none.jsonl")}], "max_length": 64}
    recipe.write_text(yaml.safe_dump(recipe_of("lora", checkpoints["vl_moe"], mixed, tmp_path / "run", data=data)))
    result = data_check(recipe, "--json", tmp_path / "found.json", "--out", tmp_path / "page.html", "--workers", 1)
    assert result.exit_code == 5
    assert f"{mixed}:5: " in result.output and "no such file" in result.output
    assert "FAULTS: 6 faulty rows, 1 unreadable sources; 14 rows of 2 sources" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [source["faulty"] for source in found["sources"]] == [6, 0] and not found["sound"]
    page = ET.fromstring((tmp_path / "page.html").read_text())  # well-formed
    text = "".join(page.itertext())
    assert "a broken image" in text and f"{mixed}:12" in text and "64 (the recipe)" in text
    assert len(page.findall(".//{http://www.w3.org/2000/svg}svg")) == 7
    assert not (tmp_path / "run").exists()


def test_sound_rows_give_exit_code_0(checkpoints, digits, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("sft", checkpoints["vl_moe"], digits / "val.jsonl", tmp_path / "run")))
    result = data_check(recipe, "data.train.0.limit=20", "--workers", 1)
    assert result.exit_code == 0 and "NO FAULTS: 20 rows of 1 sources" in result.output


def test_histograms_can_be_merged_and_have_close_quantiles(tmp_path):
    values = np.random.default_rng(0).lognormal(6, 2, 4000).astype(int).tolist()
    parts, whole = [Histogram(), Histogram()], Histogram()
    for number, value in enumerate(values):
        parts[number % 2].add(value)
        whole.add(value)
    parts[0].merge(parts[1])
    assert parts[0] == whole
    assert (whole.count, whole.total, whole.least, whole.most) == (4000, sum(values), min(values), max(values))
    for share in (0.01, 0.5, 0.95, 1.0):
        exact = sorted(values)[max(0, int(np.ceil(share * 4000)) - 1)]
        assert exact * (1 - 1 / 64) <= whole.quantile(share) <= exact  # a bin is at most 1/64 wide
    assert len(whole.bins) < 64 * 16


def test_letters_are_counted_by_script():
    assert letters_by_script("One 1, два! 二三 あア 한국 ไทย αβ é") == {
        "Latin": 4,
        "Cyrillic": 3,
        "Han": 2,
        "Kana": 2,
        "Hangul": 2,
        "Thai": 3,
        "Greek": 2,
    }
    assert letters_by_script("12 + 3 = 15\n\0") == letters_by_script("") == {}
