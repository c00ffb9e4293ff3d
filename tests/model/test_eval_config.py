"""Evaluation configs report every error; benchmark layouts are mapped; evaluations resume; checkpoints are compared."""

from __future__ import annotations

import base64
import csv
import json
import shutil

import pytest

from ernie_align.errors import DataError, RecipeError, RunError
from ernie_align.evaluation import evaluate, load_eval_config
from ernie_align.evaluation.evaluate import choose_baselines
from ernie_align.evaluation.questions import load_questions
from ernie_align.recipe.evaluation import ColumnsBlock, DataSetBlock
from tests.support.runs import ROOT, beside, write_rows


def faults_of(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_eval_config(path)
    return [(fault.where.replace(str(path), "config.yaml"), fault.what, fault.fix) for fault in caught.value.faults]


def test_every_error_of_a_config_at_once_with_its_place(tmp_path):
    text = """data:
  - {path: a.jsonl, limitt: 3}
metrics:
  - {name: exact_mach}
  - {name: anls, threshold: high}
  - {name: pass_at_k, k: [1], verifier: {name: perplexity}}
generation: {samples: 3}
"""
    faults = {where: (what, fix) for where, what, fix in faults_of(tmp_path, text)}
    assert faults["config.yaml:2:21  data[0].limitt"] == ("unknown key", "did you mean limit?")
    assert faults["config.yaml:4:12  metrics[0].name"] == ("unknown metric 'exact_mach'", "did you mean exact_match?")
    assert faults["config.yaml:5:29  metrics[1].threshold"][0] == "expected a number, got 'high'"
    assert faults["config.yaml:6:41  metrics[2].verifier"][0] == "perplexity is not a verifier"
    assert "3 greedy samples of a row are identical" in faults["config.yaml:7:23  generation.samples"][0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": [{"path": "x/a.jsonl"}, {"path": "y/a.jsonl"}]}, "the name 'a.jsonl' is used twice"),
        (
            {"metrics": [{"name": "pass_at_k", "k": [4], "verifier": {"name": "exact_match"}}]},
            "at least 4 samples per row",
        ),
        ({"data": [{"path": "a.jsonl", "instruction": "Answer."}]}, "instruction is given without columns"),
    ],
)
def test_keys_that_contradict_each_other(changed, message):
    with pytest.raises(RecipeError, match=message):
        load_eval_config({"data": [{"path": "a.jsonl"}], "metrics": [{"name": "exact_match"}], **changed})


def test_two_metrics_of_one_name(checkpoints, text_rows):
    with pytest.raises(RecipeError, match="several metrics have the name exact_match"):
        evaluate(checkpoints["dense"], text_rows, metrics=["exact_match", "exact_match"])


def test_the_shipped_configs_are_valid():
    for path in (ROOT / "recipes" / "eval").glob("*.yaml"):
        assert load_eval_config(path).data


# -- layouts of benchmarks --------------------------------------------------------------------------------------------


def asked(block):
    (question,) = load_questions(block)
    return question, question.prompt.messages[0]["content"]


def test_options_in_columns_and_an_image_in_base64(digits, tmp_path):
    """The layout of MMBench: a TSV with columns A to D, which may be empty, and the image in base64."""
    image = base64.b64encode((digits / "images" / "0003.png").read_bytes()).decode()
    path = tmp_path / "bench.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", "A", "B", "C", "answer", "category", "image"])
        writer.writerow([7, "Which digit?", "one", "two", "", "B", "ocr", image + "=" * 4 * (len(image) < 256)])
    columns = ColumnsBlock(question="question", options=["A", "B", "C"], answer="answer", image="image")
    block = DataSetBlock(path=str(path), columns=columns, kind_column="category", instruction="Answer with a letter.")
    question, parts = asked(block)
    assert parts[0] == {"type": "image"} and question.row.images[0]["bytes"] is not None
    assert parts[1]["text"] == "Which digit?\nA. one\nB. two\nAnswer with a letter."
    assert question.kind == "ocr" and question.columns["answer"] == "B"
    assert question.columns["options"] == ["one", "two"]


def test_options_as_a_list_and_several_answers(digits):
    row = {"query": "Which?", "choices": '["red", "blue"]', "label": ["blue", "navy"], "picture": "images/0004.png"}
    path = write_rows(digits / "layout.jsonl", [row])
    columns = ColumnsBlock(question="query", options="choices", answer="label", image="picture")
    question, parts = asked(DataSetBlock(path=str(path), columns=columns))
    assert parts[1]["text"] == "Which?\nA. red\nB. blue" and question.columns["answer"] == ["blue", "navy"]
    assert question.with_answer.messages[-1]["content"] == "blue"
    with pytest.raises(DataError, match="no column question"):
        asked(DataSetBlock(path=str(path), columns=ColumnsBlock(question="question")))


def test_an_image_is_placed_at_its_mark(digits):
    path = write_rows(digits / "marked.jsonl", [{"q": "See <image> here.", "image": ["images/0004.png"]}])
    _, parts = asked(DataSetBlock(path=str(path), columns=ColumnsBlock(question="q", image="image")))
    assert [part["type"] for part in parts] == ["text", "image", "text"]


def test_rewards_are_metrics(checkpoints, tmp_path):
    """Rewards by name, including a function in the user's file; each over the rows that it applies to."""
    code = tmp_path / "mine.py"
    code.write_text("def short(prompts, completions, goal, **kwargs):\n    return [float(one) for one in goal]\n")
    rows = [
        {"prompt": [{"role": "user", "content": "?"}], "answer": "x", "goal": 0.25, "box": [0, 0, 1, 1]},
        {"prompt": [{"role": "user", "content": "??"}], "answer": "y", "goal": 0.75, "box": None},
    ]
    metrics = [{"name": f"{code}:short"}, {"name": "iou", "column": "box"}, {"name": "contains", "column": "answer"}]
    metrics += [{"name": "length", "unit": "tokens", "max": 3}, {"name": "anls"}]
    plan = {"data": [{"path": str(write_rows(tmp_path / "rows.jsonl", rows))}], "metrics": metrics}
    found = {
        figure.metric: figure
        for figure in evaluate(checkpoints["dense"], config=plan | {"generation": {"max_new_tokens": 3}}).figures
    }
    assert list(found) == ["short", "iou", "contains", "length", "anls"]
    assert (found["short"].value, found["short"].n) == (0.5, 2) and found["iou"].n == 1
    assert found["length"].value == 1.0


# -- interrupted and resumed ----------------------------------------------------------------------------------------


@pytest.fixture
def plan(digits, tmp_path):
    rows = [json.loads(line) for line in (digits / "val.jsonl").read_text().splitlines()][:10]
    for row in rows:
        row["images"] = beside(tmp_path, digits, row.get("images", []))
    path = write_rows(tmp_path / "questions.jsonl", rows)
    return {
        "data": [{"path": str(path)}],
        "metrics": [{"name": "exact_match"}, {"name": "perplexity"}],
        "generation": {"max_new_tokens": 3, "batch_size": 4, "temperature": 1.0, "samples": 2},
    }


class Stopped(Exception):
    pass


def test_an_interrupted_evaluation_resumes(checkpoints, plan, tmp_path):
    """Interrupted in the middle of a line: no report exists, and the rerun ends with the same report."""

    def stop(name, done, total):
        if done >= 8:
            raise Stopped

    out, model = tmp_path / "out", checkpoints["vl_moe"]
    with pytest.raises(Stopped):
        evaluate(model, config=plan, out=out, tick=stop)
    assert not (out / "report.json").exists() and not (out / "scores.jsonl").exists()
    lines = out / "vl_moe" / "rows.jsonl"
    kept = lines.read_text()
    lines.write_text(kept[:-9])  # the crash came in the middle of a write
    resumed = evaluate(model, config=plan, out=out)
    whole = evaluate(model, config=plan, out=tmp_path / "whole")
    assert (
        0 < resumed.results[0].new_responses < whole.results[0].new_responses == 30
    )  # 10 rows: two samples and a perplexity each
    assert sorted(lines.read_text().splitlines()) == sorted(
        (tmp_path / "whole" / "vl_moe" / "rows.jsonl").read_text().splitlines()
    )
    assert resumed.rows == whole.rows and resumed.figures == whole.figures
    again = evaluate(model, config=plan, out=out)
    assert again.results[0].new_responses == 0 and again.figures == whole.figures
    assert not list(tmp_path.rglob("*.partial"))


def test_other_metrics_use_the_cache_and_other_rows_are_refused(checkpoints, plan, tmp_path):
    out, model = tmp_path / "out", checkpoints["vl_moe"]
    evaluate(model, config=plan, out=out)
    other = plan | {"metrics": [{"name": "contains", "column": "answer"}, {"name": "perplexity"}]}
    assert evaluate(model, config=other, out=out).results[0].new_responses == 0
    with pytest.raises(RunError, match="other generation settings"):
        evaluate(model, config=plan | {"generation": {"max_new_tokens": 4}}, out=out)
    changed = shutil.copytree(model, tmp_path / "other" / "vl_moe")
    nudge(changed, "norm")
    with pytest.raises(RunError, match="contains responses of another checkpoint"):
        evaluate(changed, config=plan, out=out)


def nudge(folder, part, by=1.5):
    """Scale the weights whose names contain `part`."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    touched = [name for name in tensors if part in name]
    assert touched
    save_file({name: tensor * (by if name in touched else 1) for name, tensor in tensors.items()}, path, metadata)


# -- several checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(checkpoints, digits, tmp_path_factory):
    """Evaluate a model, the same with another resampler, which text does not pass, and with other attention values."""
    folder = tmp_path_factory.mktemp("compared")
    names = [str(checkpoints["vl_moe"])]
    for name, part in (("resampler", "resampler_model"), ("attention", "self_attn.v_proj")):
        names.append(str(shutil.copytree(checkpoints["vl_moe"], folder / name)))
        nudge(folder / name, part, by=3.0)
    rows = [json.loads(line) for line in (digits / "val.jsonl").read_text().splitlines()][:12]
    path = write_rows(digits / "compared.jsonl", rows)
    plan = {
        "data": [{"path": str(path)}],
        "metrics": [{"name": "exact_match"}, {"name": "perplexity"}],
        "generation": {"max_new_tokens": 2},
        "retention": {"tokens": 200, "routed_rows": 4},
        "require": ["text_retention>=1", "perplexity<1e9", "exact_match>=2", "text_kl<=0"],
    }
    return evaluate(names, config=plan, out=folder / "out"), folder / "out"


def test_text_is_unchanged_if_no_weight_it_passes_changed(compared):
    first, resampler, attention = compared[0].report["checkpoints"]
    assert first["text"] is None
    assert resampler["text"]["bit_identical"] and (resampler["text"]["agreement"], resampler["text"]["kl"]) == (1, 0)
    assert not attention["text"]["bit_identical"] and attention["text"]["kl"] > 0
    assert attention["text"]["tokens"] == 200 and 0 <= attention["text"]["agreement"] < 1


def test_kl_equals_torchs(checkpoints, compared):
    """KL(baseline || other), token by token, from both models' logits on the shipped page of text."""
    import torch

    from ernie_align.data.render import renderer_of
    from ernie_align.evaluation.drift import load_held_out_text
    from ernie_align.models.load import load_model
    from ernie_align.recipe.evaluation import RetentionBlock

    report = compared[0].report["checkpoints"]
    models = [load_model(report[place]["checkpoint"]) for place in (0, 2)]
    renderer, total, left = renderer_of(models[0]), 0.0, 200
    for row in load_held_out_text(RetentionBlock()):
        ids = torch.tensor([renderer.examples(row, max_length=9999)[-1].input_ids[: left + 1]])
        with torch.no_grad():
            p, q = (one.model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1) for one in models)
        total += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
        left -= len(p)
        if left == 0:
            break
    # one sums in float32 over all tokens, the other token by token
    assert report[2]["text"]["kl"] == pytest.approx(total / 200, rel=1e-4)


def test_routing_is_counted_layer_by_layer(compared):
    first, resampler, attention = (checkpoint["routing"] for checkpoint in compared[0].report["checkpoints"])
    assert first["flipped"] is None and first["rows"] == 4
    for layer in attention["layers"]:
        assert sum(layer["load"]) == pytest.approx(1) and layer["tokens"] > 0
        assert layer["unused"] == [expert for expert, load in enumerate(layer["load"]) if load == 0]
    assert {(layer["layer"], layer["pool"]) for layer in first["layers"]} == {
        (layer, pool) for layer in (1, 2, 3) for pool in ("text", "vision")
    }
    assert resampler["flipped"]["vision"] > 0 and attention["flipped"]["text"] > 0
    text_before_images = [layer for layer in resampler["layers"] if (layer["layer"], layer["pool"]) == (1, "vision")]
    assert text_before_images[0]["flipped"] > 0


def test_differences_follow_from_the_rows(compared):
    evaluation, out = compared
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for one in evaluation.report["differences"]:
        own = [row for row in rows if one["kind"] in (row["kind"], "all")]
        scores = [
            [row["results"][name]["scores"][one["measure"]] for row in own] for name in (one["checkpoint"], "vl_moe")
        ]
        lower = one["measure"] == "perplexity"
        assert one["wins"] == sum((a < b) if lower else (a > b) for a, b in zip(*scores, strict=True))
        assert one["wins"] + one["losses"] + one["ties"] == one["n"] == len(own)
        # the interval is of 2000 draws: its ends are not exact, and with few rows the figure may lie on one
        low, high = one["interval"]
        assert low - 1e-9 <= one["difference"] <= high + 1e-9 or len(own) < 6
    changes = evaluation.report["changed"]
    assert changes and all(abs(change["gain"]) > 0 for change in changes)


def write_checkpoint(folder, base=None):
    """The files that tell a model from an adapter of `base`."""
    folder.mkdir()
    name, content = ("config.json", {}) if base is None else ("adapter_config.json", {"base_model_name_or_path": base})
    (folder / name).write_text(json.dumps(content))
    return str(folder)


def test_an_adapter_is_compared_with_its_own_base(tmp_path, monkeypatch):
    """An adapter with its base if that is listed, everything else with the first; or all with a named one."""
    monkeypatch.chdir(tmp_path)
    names = {"init": write_checkpoint(tmp_path / "init"), "sft": write_checkpoint(tmp_path / "sft")}
    names["lora"] = write_checkpoint(tmp_path / "lora", base="sft")  # relative, as PEFT writes what a recipe names
    names["other"] = write_checkpoint(tmp_path / "other", base=str(tmp_path / "unlisted"))
    assert choose_baselines(names) == {"init": None, "sft": "init", "lora": "sft", "other": "init"}
    adapter_first = dict(reversed(names.items()))
    assert choose_baselines(adapter_first) == {"other": None, "lora": "sft", "sft": "other", "init": "other"}
    assert choose_baselines({"lora": names["lora"], "sft": names["sft"]}) == {"lora": "sft", "sft": None}
    assert choose_baselines(names, "other") == {"init": "other", "sft": "other", "lora": "other", "other": None}
    assert choose_baselines({"sft": names["sft"]}) == {"sft": None}


def test_a_named_baseline_is_what_all_others_are_compared_with(checkpoints, compared, plan):
    """Named by its short name, and a folder that is not listed, which then comes first."""
    folders = [one["checkpoint"] for one in compared[0].report["checkpoints"]]
    few = plan | {"metrics": [{"name": "perplexity"}], "generation": {}, "retention": {"tokens": 20, "routed_rows": 1}}
    listed = evaluate(folders[1:], config=few, baseline="attention").report
    assert [one["baseline"] for one in listed["checkpoints"]] == ["attention", None]
    assert [one["name"] for one in listed["checkpoints"]] == ["resampler", "attention"]
    assert listed["checkpoints"][0]["text"]["agreement"] < 1 and listed["checkpoints"][1]["text"] is None
    added = evaluate(folders[1], config=few, baseline=folders[0]).report
    assert [(one["name"], one["baseline"]) for one in added["checkpoints"]] == [
        ("vl_moe", None), ("resampler", "vl_moe"),
    ]  # fmt: skip
    assert {one["checkpoint"] for one in added["differences"]} == {"resampler"}
    assert added["checkpoints"][1]["text"]["bit_identical"]


def test_the_baseline_is_exempt_from_requirements(compared):
    evaluation, _ = compared
    verdicts = {(line["requirement"], line["checkpoint"]): line["passed"] for line in evaluation.report["requirements"]}
    assert verdicts[("text_retention>=1", "resampler")] and not verdicts[("text_retention>=1", "attention")]
    assert verdicts[("text_kl<=0", "resampler")] and verdicts[("perplexity<1e9", "attention")]
    assert not verdicts[("exact_match>=2", "resampler")] and not evaluation.passed
    assert {checkpoint for _, checkpoint in verdicts} == {"resampler", "attention"}


def test_the_report_is_valid_by_its_schema(compared):
    from importlib.resources import files

    from jsonschema import Draft202012Validator

    schema = json.loads(files("ernie_align.evaluation").joinpath("report.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    report = json.loads((compared[1] / "report.json").read_text())
    assert [error.message for error in Draft202012Validator(schema).iter_errors(report)] == []
    for row in report["shown"]:
        assert all((compared[1] / image).is_file() for image in row["images"])


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("exact_mach>=0.5", "did you mean exact_match?"),
        ("exact_match=>0.5", "is not a valid requirement"),
        ("exact_match@other.jsonl>=1", "unknown data set other.jsonl"),
        ("exact_match/nothing>=1", "no row has the kind nothing"),
        ("text_retention>=0.9", "only one checkpoint is evaluated"),
    ],
)
def test_a_requirement_is_parsed_before_a_model_is_loaded(text_rows, requirement, message):
    with pytest.raises(RecipeError) as caught:
        evaluate("no-such-model", text_rows, require=[requirement])
    assert message in str(caught.value)
