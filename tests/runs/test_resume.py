"""A run that was stopped and resumed equals the run that was never stopped; and a folder holds one run only."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import pytest

from ernie_align.errors import DataError, RecipeError, RunError
from ernie_align.runs import load_recipe, run
from ernie_align.runs.run_dir import RunDirectory
from tests.support.callbacks import RecordingReporter
from tests.support.runs import FAMILIES, assert_same_run, logged, long_run, run_quietly, stopped_after, write_rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["sft", "lora"])
def test_a_resumed_run_equals_one_that_never_stopped(checkpoints, text_rows, digits, tmp_path, stage, family):
    rows = digits / "val.jsonl" if family == "vl_moe" else text_rows
    blocks = {"data": {"train": [{"path": str(rows), "limit": 24}]}}
    if stage == "lora":  # dropout draws from the generator that a resume must restore
        scopes = ["attention", "dense_mlp"] if family == "dense" else ["attention", "text_experts"]
        blocks["adapter"] = {"scopes": scopes, "dropout": 0.1 if family == "dense" else 0.0}
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_quietly(long_run(stage, checkpoints, family, rows, whole, **blocks))
    stopped_after(3, whole, again)
    run_quietly(long_run(stage, checkpoints, family, rows, again, **blocks), resume=True)
    for key in ("grad_norm", "learning_rate"):
        assert logged(again, key) == logged(whole, key)
    assert_same_run(again, whole)


def test_a_stream_resumes_in_order(checkpoints, text_rows, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    blocks = {"data": {"streaming": True}, "tune": {"scopes": ["attention"]}}
    run_quietly(long_run("sft", checkpoints, "dense", text_rows, whole, **blocks))
    stopped_after(3, whole, again)
    run_quietly(long_run("sft", checkpoints, "dense", text_rows, again, **blocks), resume=True)
    assert logged(again) == logged(whole)


@pytest.mark.parametrize("streaming", [False, True])
def test_packs_resume_in_order(checkpoints, text_rows, digits, tmp_path, streaming):
    """They follow from the rows and the seed: checkpoints hold nothing about them."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    family, rows = ("dense", text_rows) if streaming else ("vl_moe", digits / "val.jsonl")
    source = {"path": str(rows)} if streaming else {"path": str(rows), "limit": 24}
    blocks = {"data": {"train": [source], "streaming": streaming, "max_length": 80}}
    blocks["training"] = {"packing": True, "per_device_train_batch_size": 2}
    run_quietly(long_run("lora", checkpoints, family, rows, whole, **blocks))
    stopped_after(3, whole, again)
    run_quietly(long_run("lora", checkpoints, family, rows, again, **blocks), resume=True)
    for key in ("loss", "grad_norm"):
        assert logged(again, key) == logged(whole, key)


def test_a_resumed_run_still_checks_text_parity(checkpoints, digits, tmp_path):
    """Against the logits at the first start of the run, not when it was resumed."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    blocks = {"tune": {"scopes": ["vision_experts", "resampler"]}}
    run_quietly(long_run("sft", checkpoints, "vl_moe", digits / "parity_val.jsonl", whole, **blocks))
    stopped_after(3, whole, again)
    assert run_quietly(
        long_run("sft", checkpoints, "vl_moe", digits / "parity_val.jsonl", again, **blocks), resume=True
    ).text_unchanged


@pytest.fixture(scope="module")
def a_run(checkpoints, tmp_path_factory):
    """One finished run to damage in many ways."""
    folder = tmp_path_factory.mktemp("run")
    row = {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "one"}]}
    rows = write_rows(folder / "rows.jsonl", [row] * 24)
    recipe = long_run("lora", checkpoints, "dense", rows, folder / "run")
    run_quietly(recipe)
    return folder / "run", recipe


@pytest.fixture
def again(a_run, tmp_path):
    """The same run, stopped after its last checkpoint, and its recipe."""
    run_dir, recipe = a_run
    stopped_after(6, run_dir, tmp_path / "run")
    return tmp_path / "run", {**recipe, "run": {"dir": str(tmp_path / "run")}}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda checkpoint: (checkpoint / "complete.json").unlink(), "its write was interrupted"),
        (lambda checkpoint: (checkpoint / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda checkpoint: (checkpoint / "adapter_model.safetensors").write_bytes(b"x"), "has 1 bytes instead of"),
    ],
)
def test_an_incomplete_checkpoint_is_named_and_skipped(again, a_run, damage, reason):
    run_dir, recipe = again
    damage(run_dir / "checkpoint-6")
    reporter = RecordingReporter()
    run(load_recipe(recipe), resume=True, reporter=reporter)
    assert any(line.startswith("skipped checkpoint-6:") and reason in line for line in reporter.lines)
    assert f"resuming from {run_dir / 'checkpoint-3'}" in reporter.lines
    assert logged(run_dir) == logged(a_run[0])


def test_a_checkpoint_of_deepspeed_is_resumed_by_deepspeed_only(again):
    """Trainer would start with an empty optimizer, without a warning."""
    run_dir, recipe = again
    written = run_dir / "checkpoint-6" / "global_step6"
    written.mkdir()
    for process in range(2):
        (written / f"zero_pp_rank_{process}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(RunError, match="written with DeepSpeed on 2 processes, but this run is without DeepSpeed"):
        run_quietly(recipe, resume=True)


def test_without_a_complete_checkpoint_the_run_starts_at_step_0(again, a_run):
    run_dir, recipe = again
    for checkpoint in run_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    run_quietly(recipe, resume=True)
    assert logged(run_dir) == logged(a_run[0])


def test_resume_starts_a_run_that_never_started(a_run, tmp_path):
    recipe = {**a_run[1], "run": {"dir": str(tmp_path / "new")}}
    recipe["training"] = {**recipe["training"], "max_steps": 1}
    assert run_quietly(recipe, resume=True).final.exists()


def test_a_run_that_failed_before_its_first_step_leaves_no_obstacle(a_run, tmp_path):
    recipe = {**a_run[1], "run": {"dir": str(tmp_path / "new")}}
    invalid = {**recipe, "training": {**recipe["training"], "warmup_steps": -1}}
    with pytest.raises(RecipeError, match="SFTConfig rejects it"):
        run_quietly(invalid)
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError):
        run_quietly({**recipe, "data": {"train": [{"path": str(tmp_path / "none.jsonl")}]}})
    recipe["training"] = {**recipe["training"], "max_steps": 1}
    assert run_quietly(recipe).final.exists()


def test_nothing_is_ever_overwritten(a_run, again, tmp_path):
    run_dir, recipe = a_run
    with pytest.raises(RunError, match="holds a finished run"):
        run_quietly(recipe)
    assert run_quietly(recipe, resume=True).final == run_dir / "final"  # already finished: it is left alone
    with pytest.raises(RunError, match="holds an unfinished run") as caught:
        run_quietly(again[1])
    assert "--resume" in str(caught.value)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(RunError, match=r"is not a run directory \(thesis.tex\)"):
            run_quietly({**recipe, "run": {"dir": str(tmp_path / "foreign")}}, resume=resume)
    with pytest.raises(RunError, match="is a file"):
        run_quietly({**recipe, "run": {"dir": str(tmp_path / "foreign" / "thesis.tex")}})


def test_another_recipe_does_not_resume(again):
    _, recipe = again
    recipe = {**recipe, "training": {**recipe["training"], "learning_rate": 1e-2, "max_steps": 9}}
    with pytest.raises(RunError) as caught:
        run_quietly(recipe, resume=True)
    (fault,) = caught.value.faults  # more steps are allowed; another learning rate makes another run
    assert fault.where == "training.learning_rate" and fault.what == "0.01 now, 0.001 when the run started"


def test_a_directory_in_use_is_rejected(tmp_path):
    """The error names the process that holds it; afterwards another process may have it."""
    first = RunDirectory(tmp_path)
    assert first.acquire("stage: sft\n", resume=False) is False
    code = (
        "from ernie_align.errors import RunError\n"
        "from ernie_align.runs.run_dir import RunDirectory\n"
        "try:\n"
        f"    RunDirectory({str(tmp_path)!r}).acquire('', resume=True)\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"is in use by process {os.getpid()} on {platform.node()}" in output
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        RunDirectory(tmp_path).acquire("", resume=True)
    first.release()
    RunDirectory(tmp_path).acquire("", resume=True)
