"""The command line: output, errors and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import ernie_align
from ernie_align.cli import app, main
from tests.support.runs import logged, recipe_of


def write_recipe(tmp_path, *args, **blocks):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(*args, **blocks)))
    return path


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def run_main(monkeypatch, capsys, *args):
    """Return the exit code and the error stream."""
    monkeypatch.setattr(sys, "argv", ["ernie-align", *map(str, args)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, capsys.readouterr().err


def test_check_shows_what_would_be_trained_and_writes_nothing(checkpoints, digits, tmp_path):
    recipe = write_recipe(tmp_path, "lora", checkpoints["vl_moe"], digits / "train.jsonl", tmp_path / "run")
    result = invoke("check", recipe, "adapter.scopes=[vision_experts]", "training.packing=true", "--rows", "20")
    assert result.exit_code == 0
    assert "vision_experts" in result.output and "6 of 6" in result.output
    assert "<|IMAGE_PLACEHOLDER|>x4" in result.output and "the 20 rows that were checked" in result.output
    assert "packing: 20 rows in" in result.output
    assert not (tmp_path / "run").exists()


def test_train_evaluate_and_generate(checkpoints, digits, tmp_path):
    recipe = write_recipe(tmp_path, "lora", checkpoints["vl_moe"], digits / "val.jsonl", tmp_path / "run")
    result = invoke("lora", recipe, "training.max_steps=2")
    assert result.exit_code == 0, result.output
    assert len(logged(tmp_path / "run")) == 2 and "finished:" in result.output
    assert "step 2 of 2: loss" in result.output  # no terminal to draw a bar on
    assert "is already finished" in invoke("lora", recipe, "training.max_steps=2", "--resume").output

    report = tmp_path / "report.json"
    final = tmp_path / "run" / "final"
    result = invoke(
        "eval", checkpoints["vl_moe"], final, "--data", digits / "val.jsonl", "--limit", 6, "--max-new-tokens", 2,
        "--out", report,
    )  # fmt: skip
    assert result.exit_code == 0 and "exact_match" in result.output
    evaluated = [entry["checkpoint"] for entry in json.loads(report.read_text())["checkpoints"]]
    assert evaluated == [str(checkpoints["vl_moe"]), str(final)]

    image = digits / "images" / "0005.png"
    result = invoke("generate", final, "--image", image, "--prompt", "Which digit is this?", "--max-new-tokens", 3)
    assert result.exit_code == 0 and result.output.endswith("\n")


def test_errors_are_printed_without_a_traceback(checkpoints, digits, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, "sft", checkpoints["dense"], tmp_path / "none.jsonl", tmp_path / "run")
    code, output = run_main(monkeypatch, capsys, "sft", recipe, "training.max_stepz=3")
    assert code == 2 and "command line: training.max_stepz: unknown key" in output and "Traceback" not in output
    code, output = run_main(monkeypatch, capsys, "lora", recipe)
    assert code == 2 and "run ernie-align sft, not lora" in output
    code, output = run_main(monkeypatch, capsys, "sft", recipe)
    assert code == 1 and f"{recipe}:4:" in output and "data.train[0].path: no such file" in output
    code, output = run_main(monkeypatch, capsys, "check", recipe)
    assert code == 1 and "no such file" in output
    arguments = (checkpoints["dense"], "--image", digits / "images" / "0000.png", "--prompt", "?")
    code, output = run_main(monkeypatch, capsys, "generate", *arguments)
    assert code == 1 and "has no vision" in output
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "mine").touch()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"src": "a", "tgt": "b"}) + "\n")
    code, output = run_main(
        monkeypatch, capsys, "sft", recipe, f"data.train.0.path={rows}", f"run.dir={tmp_path / 'run2'}"
    )
    assert code == 3 and "is not empty and is not a run directory" in output and "(mine)" in output


def test_vision_scopes_on_a_text_model(checkpoints, text_rows, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, "lora", checkpoints["moe"], text_rows, tmp_path / "run")
    code, output = run_main(monkeypatch, capsys, "check", recipe, "adapter.scopes=[vision_experts]")
    assert code == 1
    assert "command line: adapter.scopes: this model (moe) has no vision_experts" in output
    assert "choose from embeddings, attention, dense_mlp" in output


@pytest.mark.parametrize("kind", ["dense", "digits"])
def test_tiny_writes_into_new_folders_only(kind, tmp_path, monkeypatch, capsys):
    assert invoke("tiny", kind, tmp_path / "new").exit_code == 0
    code, output = run_main(monkeypatch, capsys, "tiny", kind, tmp_path / "new")
    assert code == 1 and "the folder is not empty" in output
    assert invoke("tiny", "huge", tmp_path / "other").exit_code == 2


def test_the_schema_is_json():
    assert json.loads(invoke("schema").output)["title"] == "ernie-align recipe"


def test_help_lists_every_command():
    output = invoke("--help").output
    stages = ("sft", "lora", "dpo", "kto", "upo")
    names = (*stages, "check", "plan", "eval", "report", "generate", "export", "tiny", "schema")
    assert all(name in output for name in names)


COMMANDS = [[], ["data", "check"], ["data", "doctor"], ["recipes", "copy"]]
COMMANDS += [[name] for name in get_command(app).commands]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command):
    """rich reads square brackets in a help text as markup, and fails at some."""
    result = invoke(*command, "--help")
    assert result.exit_code == 0 and "Usage: " in result.output


def test_old_names_say_what_they_are_called_now(monkeypatch, capsys):
    code, output = run_main(monkeypatch, capsys, "eval", "model", "--plan", "recipes/eval/digits.yaml")
    assert code == 2 and "this option is now called --config" in output
    assert "--plan" not in invoke("eval", "--help").output and "doctor" not in invoke("data", "--help").output
    with pytest.raises(AttributeError, match=r"now called ernie_align\.check_data"):
        ernie_align.examine  # noqa: B018


def test_the_public_names():
    from ernie_align import check, check_data, evaluate, export, load_model, load_recipe, plan, run, selfcheck

    names = {"check", "evaluate", "check_data", "export", "load_model", "load_recipe", "plan", "run", "selfcheck"}
    assert all(
        callable(name) for name in (check, evaluate, check_data, export, load_model, load_recipe, plan, run, selfcheck)
    )
    assert set(ernie_align.__all__) == names
    with pytest.raises(AttributeError):
        ernie_align.nothing  # noqa: B018


def test_accelerate_drives_the_same_run_from_outside(checkpoints, text_rows, tmp_path):
    """`accelerate launch -m ernie_align sft recipe.yaml`, on one process: the same losses."""
    from tests.support.runs import run_quietly

    recipe = write_recipe(tmp_path, "sft", checkpoints["dense"], text_rows, tmp_path / "launched")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["-m", "ernie_align", "sft", str(recipe)]
    # as many threads as this process uses: another number would sum in another order
    import torch

    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, **threads})
    assert done.returncode == 0, done.stderr
    run_quietly(recipe_of("sft", checkpoints["dense"], text_rows, tmp_path / "called"))
    assert logged(tmp_path / "launched") == logged(tmp_path / "called")
