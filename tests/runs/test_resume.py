"""A run that was stopped and resumed is the run that was never stopped; and a folder holds one run, ever."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from ernie_align.checkpoints import integrity_error, write_manifest
from ernie_align.errors import RunError
from ernie_align.runs.run_dir import RunDirectory
from tests.support.runs import FAMILIES, logged, long_run, run_quietly, stopped_after, tensors_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["sft", "lora"])
def test_resumed_is_never_stopped(checkpoints, text_rows, digits, tmp_path, stage, family):
    rows = digits / "val.jsonl" if family == "vl_moe" else text_rows
    blocks = {"data": {"train": [{"path": str(rows), "limit": 24}]}}
    if stage == "lora":  # dropout draws from the generator that a resume must restore
        scopes = ["attention", "dense_mlp"] if family == "dense" else ["attention", "text_experts"]
        blocks["adapter"] = {"scopes": scopes, "dropout": 0.1 if family == "dense" else 0.0}
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_quietly(long_run(stage, checkpoints, family, rows, whole, **blocks))
    stopped_after(3, whole, again)
    run_quietly(long_run(stage, checkpoints, family, rows, again, **blocks), resume=True)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(again, key) == logged(whole, key)
    expected, found = tensors_of(whole / "final"), tensors_of(again / "final")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_stream_resumes_in_order(checkpoints, text_rows, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    blocks = {"data": {"streaming": True}, "tune": {"scopes": ["attention"]}}
    run_quietly(long_run("sft", checkpoints, "dense", text_rows, whole, **blocks))
    stopped_after(3, whole, again)
    run_quietly(long_run("sft", checkpoints, "dense", text_rows, again, **blocks), resume=True)
    assert logged(again) == logged(whole)


@pytest.mark.parametrize("streaming", [False, True])
def test_packs_resume_in_order(checkpoints, text_rows, digits, tmp_path, streaming):
    """They follow from the rows and the seed: nothing about them is kept."""
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


def test_a_resumed_run_still_certifies_its_text(checkpoints, digits, tmp_path):
    """Against what the model said when the run first began, not when it was resumed."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    blocks = {"tune": {"scopes": ["vision_experts", "resampler"]}}
    run_quietly(long_run("sft", checkpoints, "vl_moe", digits / "parity_val.jsonl", whole, **blocks))
    stopped_after(3, whole, again)
    assert run_quietly(
        long_run("sft", checkpoints, "vl_moe", digits / "parity_val.jsonl", again, **blocks), resume=True
    ).text_unchanged


@pytest.fixture(scope="module")
def a_run(checkpoints, tmp_path_factory):
    """One finished run to break in many ways."""
    from tests.support.runs import write_rows

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


class Listener:
    """A reporter that remembers what was said."""

    def __init__(self):
        self.lines = []

    def log(self, line):
        self.lines.append(line)

    def progress(self):
        return []

    def __getattr__(self, name):
        return lambda *args: None


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda checkpoint: (checkpoint / "complete.json").unlink(), "its write was interrupted"),
        (lambda checkpoint: (checkpoint / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda checkpoint: (checkpoint / "adapter_model.safetensors").write_bytes(b"x"), "has 1 bytes instead of"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named_and_passed_over(again, a_run, harm, reason):
    from ernie_align.runs import load_recipe, run

    run_dir, recipe = again
    harm(run_dir / "checkpoint-6")
    listener = Listener()
    run(load_recipe(recipe), resume=True, reporter=listener)
    assert any(line.startswith("passed over checkpoint-6:") and reason in line for line in listener.lines)
    assert f"resuming from {run_dir / 'checkpoint-3'}" in listener.lines
    assert logged(run_dir) == logged(a_run[0])


def test_a_checkpoint_of_deepspeed_is_gone_on_with_by_deepspeed(again):
    """Trainer would begin with an empty optimizer, and say nothing."""
    run_dir, recipe = again
    written = run_dir / "checkpoint-6" / "global_step6"
    written.mkdir()
    for process in range(2):
        (written / f"zero_pp_rank_{process}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(RunError, match="written with DeepSpeed on 2 processes, but this run is without DeepSpeed"):
        run_quietly(recipe, resume=True)


def test_with_no_whole_checkpoint_the_run_begins_anew(again, a_run):
    run_dir, recipe = again
    for checkpoint in run_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    run_quietly(recipe, resume=True)
    assert logged(run_dir) == logged(a_run[0])


def test_resume_begins_a_run_that_never_began(a_run, tmp_path):
    recipe = {**a_run[1], "run": {"dir": str(tmp_path / "new")}}
    recipe["training"] = {**recipe["training"], "max_steps": 1}
    assert run_quietly(recipe, resume=True).final.exists()


def test_a_run_that_failed_before_its_first_step_leaves_no_obstacle(a_run, tmp_path):
    from ernie_align.errors import DataError, RecipeError

    recipe = {**a_run[1], "run": {"dir": str(tmp_path / "new")}}
    integrity_error = {**recipe, "training": {**recipe["training"], "warmup_steps": -1}}
    with pytest.raises(RecipeError, match="SFTConfig refuses it"):
        run_quietly(integrity_error)
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError):
        run_quietly({**recipe, "data": {"train": [{"path": str(tmp_path / "none.jsonl")}]}})
    recipe["training"] = {**recipe["training"], "max_steps": 1}
    assert run_quietly(recipe).final.exists()


def test_nothing_is_overwritten(a_run, again, tmp_path):
    run_dir, recipe = a_run
    with pytest.raises(RunError, match="holds a finished run"):
        run_quietly(recipe)
    assert run_quietly(recipe, resume=True).final == run_dir / "final"  # finished already, and left alone
    with pytest.raises(RunError, match="holds an unfinished run") as caught:
        run_quietly(again[1])
    assert "--resume" in str(caught.value)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(RunError, match=r"holds something else \(thesis.tex\)"):
            run_quietly({**recipe, "run": {"dir": str(tmp_path / "foreign")}}, resume=resume)
    with pytest.raises(RunError, match="is a file"):
        run_quietly({**recipe, "run": {"dir": str(tmp_path / "foreign" / "thesis.tex")}})


def test_another_recipe_does_not_resume(again):
    _, recipe = again
    recipe = {**recipe, "training": {**recipe["training"], "learning_rate": 1e-2, "max_steps": 9}}
    with pytest.raises(RunError) as caught:
        run_quietly(recipe, resume=True)
    (fault,) = caught.value.faults  # more steps may be asked for; another learning rate is another run
    assert fault.where == "training.learning_rate" and fault.what == "0.01 now, 0.001 when the run began"


def test_a_directory_in_use_is_refused(tmp_path):
    first = RunDirectory(tmp_path)
    assert first.begin("stage: sft\n", resume=False) is False
    code = (
        "import sys\n"
        "from ernie_align.errors import RunError\n"
        "from ernie_align.runs.run_dir import RunDirectory\n"
        "try:\n"
        f"    RunDirectory({str(tmp_path)!r}).begin('', resume=True)\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "is in use by process" in told
    first.release()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == ""


def test_a_seal_is_broken_by_any_change_of_size(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.bin").write_bytes(b"12345")
    assert integrity_error(tmp_path) == "its write was interrupted"
    write_manifest(tmp_path)
    assert integrity_error(tmp_path) is None
    (tmp_path / "deep" / "a.bin").write_bytes(b"1234")
    assert integrity_error(tmp_path) == "deep/a.bin has 4 bytes instead of 5"
