"""Whatever ends a run, what was whole stays whole, the error says where to go on, and going on is exact."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import TrainerCallback

from ernie_align.checkpoints import MANIFEST, integrity_error, write_manifest
from ernie_align.errors import Interrupted, RunError
from ernie_align.runs import load_recipe, run
from ernie_align.runs.run_dir import RunDirectory
from tests.support.runs import Reporter, logged, recipe_of, run_quietly, tensors_of, write_rows


class At(TrainerCallback):
    """Does something at a step: before its batch, at its end, or in its evaluation."""

    def __init__(self, step, act, event="on_step_begin"):
        self.step, self.act = step, act
        setattr(self, event, self.look)

    def look(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    row = {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "one"}]}
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [row] * 24)


@pytest.fixture(scope="module")
def of(checkpoints, rows):
    """Run directory -> a recipe of six steps with a checkpoint at the third."""

    def make(run_dir, **training):
        recipe = recipe_of("lora", checkpoints["dense"], rows, run_dir)
        recipe["training"] |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **training}
        return recipe

    return make


@pytest.fixture(scope="module")
def whole(of, tmp_path_factory):
    """The run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_quietly(of(run_dir))
    return run_dir


def same(run_dir, whole):
    expected, found = tensors_of(whole / "final"), tensors_of(run_dir / "final")
    assert logged(run_dir) == logged(whole)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def signalled(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


# -- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_running_step(of, whole, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run(load_recipe(of(tmp_path / "run")), reporter=Reporter(At(4, signalled(number))))
    assert f"stopped by {number.name} after step 5" in str(caught.value)
    assert "--resume goes on from checkpoint-5" in str(caught.value)
    assert integrity_error(tmp_path / "run" / "checkpoint-5", hashes=True) is None
    assert signal.getsignal(number) == before
    run_quietly(of(tmp_path / "run"), resume=True)
    same(tmp_path / "run", whole)


def test_the_second_interrupt_does_not_wait(of, tmp_path):
    def twice():
        signalled(signal.SIGINT)()
        signalled(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(of(tmp_path / "run")), reporter=Reporter(At(1, twice)))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_signal_before_the_first_step_leaves_no_obstacle(of, tmp_path):
    class Early(Reporter):
        def sources(self, counts):
            signalled()()

    with pytest.raises(Interrupted, match="outside of training"):
        run(load_recipe(of(tmp_path / "run")), reporter=Early())
    assert run_quietly(of(tmp_path / "run", max_steps=1)).final.exists()


@pytest.mark.parametrize("step", [2, 6])
def test_a_signal_cuts_an_evaluation_off_and_keeps_the_step(of, rows, whole, tmp_path, step):
    """At step 2 no checkpoint was due; at step 6, in the evaluation at the end, there is one already."""
    recipe = of(tmp_path / "run", eval_strategy="steps", eval_steps=2 if step == 2 else 100)
    recipe["data"] = {**recipe["data"], "eval": [{"path": str(rows), "limit": 8}]}
    with pytest.raises(Interrupted, match=f"after step {step}"):
        run(load_recipe(recipe), reporter=Reporter(At(step, signalled(), "on_prediction_step")))
    assert integrity_error(tmp_path / "run" / f"checkpoint-{step}") is None
    run_quietly(recipe, resume=True)
    same(tmp_path / "run", whole)


def test_the_command_line_ends_with_a_code_of_its_own(of, tmp_path, monkeypatch, capsys):
    import yaml

    from ernie_align import cli, runs

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(of(tmp_path / "run", max_steps=2)))
    stopped = run
    monkeypatch.setattr(
        runs, "run", lambda recipe, **kwargs: stopped(recipe, reporter=Reporter(At(0, signalled())), resume=False)
    )
    monkeypatch.setattr(sys, "argv", ["ernie-align", "lora", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 75 and "--resume goes on from checkpoint-1" in capsys.readouterr().err


# -- the disk


def test_a_full_disk_is_seen_before_the_old_checkpoint_goes(of, whole, tmp_path, monkeypatch):
    usage = shutil.disk_usage

    def nearly_full():
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))

    recipe = of(tmp_path / "run", save_total_limit=1)
    reporter = Reporter(At(3, nearly_full))
    with pytest.raises(RunError) as caught:
        run(load_recipe(recipe), reporter=reporter)
    told = str(caught.value)
    assert "the checkpoint of step 6 needs" in told and "0.000 GB are free" in told
    assert "whole up to checkpoint-3, from which --resume goes on" in told
    assert not (tmp_path / "run" / "checkpoint.partial").exists()
    monkeypatch.undo()
    run_quietly(recipe, resume=True)
    same(tmp_path / "run", whole)


def test_a_disk_that_will_be_full_is_told_a_checkpoint_ahead(of, tmp_path, monkeypatch):
    class Full(Reporter):
        def progress(self):
            return [At(3, lambda: monkeypatch.setattr(shutil, "disk_usage", lambda path: FULL), "on_save")]

    FULL = shutil.disk_usage(tmp_path)._replace(free=1000)
    reporter = Full()
    with pytest.raises(RunError):
        run(load_recipe(of(tmp_path / "run")), reporter=reporter)
    assert any(line.startswith("step 3: the next checkpoint needs") for line in reporter.lines)


@pytest.mark.parametrize("size", [2_000, 100_000])
def test_a_disk_that_fills_in_mid_write(of, whole, tmp_path, size):
    """At a small file of Python's, and at a large one of torch's or safetensors', whose errors have no number."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(RunError) as caught:
            full = At(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)))
            run(load_recipe(of(tmp_path / "run")), reporter=Reporter(full))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = str(caught.value)
    assert "the checkpoint of step 6 could not be written" in told and "whole up to checkpoint-3" in told
    assert not (tmp_path / "run" / "checkpoint.partial").exists()
    run_quietly(of(tmp_path / "run"), resume=True)
    same(tmp_path / "run", whole)


# -- checkpoints


@pytest.fixture
def stopped(whole, of, tmp_path):
    """The run as it is before its last step is finished, and its recipe."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run", of(tmp_path / "run")


def test_a_flipped_bit_is_found_and_passed_over(stopped, whole):
    run_dir, recipe = stopped
    path = run_dir / "checkpoint-6" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    reporter = Reporter()
    run(load_recipe(recipe), resume=True, reporter=reporter)
    told = "passed over checkpoint-6: optimizer.pt changed since it was written: its sha256 differs"
    assert told in reporter.lines and f"resuming from {run_dir / 'checkpoint-3'}" in reporter.lines
    assert integrity_error(run_dir / "checkpoint-6", hashes=True) is None  # written again
    same(run_dir, whole)


def test_a_seal_that_is_no_seal_is_told(tmp_path):
    (tmp_path / "a").write_text("a")
    for content in ("", "[]", '{"a": {}}', '{"a": "b"}', "{"):
        (tmp_path / MANIFEST).write_text(content)
        assert integrity_error(tmp_path).startswith(f"{MANIFEST} cannot be read") or content == "[]"
    (tmp_path / MANIFEST).write_text('{"a": 1}')  # of earlier versions
    assert integrity_error(tmp_path, hashes=True) is None


def test_hashes_are_those_of_sha256sum_and_pieces_are_told_apart(tmp_path, monkeypatch):
    import hashlib

    from ernie_align import checkpoints

    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    sealed = json.loads((tmp_path / MANIFEST).read_text())
    assert sealed["a"] == {"size": 10, "sha256": [hashlib.sha256(b"0123456789").hexdigest()]}
    assert sealed["empty"]["sha256"] == [hashlib.sha256(b"").hexdigest()]
    monkeypatch.setattr(checkpoints, "_PIECE", 4)
    write_manifest(tmp_path)
    pieces = [hashlib.sha256(piece).hexdigest() for piece in (b"0123", b"4567", b"89")]
    assert json.loads((tmp_path / MANIFEST).read_text())["a"]["sha256"] == pieces
    (tmp_path / "a").write_bytes(b"012345678x")
    assert integrity_error(tmp_path) is None and "sha256 differs" in integrity_error(tmp_path, hashes=True)


def test_what_is_half_written_is_never_taken_for_a_checkpoint(stopped, whole):
    """What each dangerous moment leaves: in a save, in a removal, and at the very end."""
    run_dir, recipe = stopped
    shutil.copytree(run_dir / "checkpoint-3", run_dir / "checkpoint.partial" / "checkpoint-6")
    (run_dir / "checkpoint-6" / MANIFEST).unlink()
    (run_dir / "checkpoint-6").rename(run_dir / "checkpoint-6.partial")
    shutil.copytree(run_dir / "checkpoint-3", run_dir / "final.partial")
    (run_dir / "metrics.jsonl").write_text((run_dir / "metrics.jsonl").read_text() + '{"step": 7, "lo')
    reporter = Reporter()
    run(load_recipe(recipe), resume=True, reporter=reporter)
    for name in ("checkpoint.partial", "checkpoint-6.partial", "final.partial"):
        assert f"removed {name}: left by a run that was killed" in reporter.lines
    assert not list(run_dir.rglob("*.partial"))
    assert integrity_error(run_dir / "final", hashes=True) is None
    same(run_dir, whole)


def test_a_run_that_was_killed_after_its_last_step_takes_no_other(of, tmp_path):
    """In the middle of an epoch Trainer would: it asks whether to stop after a step only."""
    recipe = of(tmp_path / "whole", max_steps=4, save_steps=2)
    run_quietly(recipe)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    reporter = Reporter()
    run(load_recipe({**recipe, "run": {"dir": str(tmp_path / "run")}}), resume=True, reporter=reporter)
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-4'}" in reporter.lines
    same(tmp_path / "run", tmp_path / "whole")


def test_the_best_checkpoint_is_found_where_it_is_kept(of, rows, tmp_path):
    """Trainer notes where it wrote the checkpoint, from where it has moved since."""
    training = {"eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 1, "load_best_model_at_end": True}
    recipe = of(tmp_path / "run", **training)
    recipe["data"] = {**recipe["data"], "eval": [{"path": str(rows), "limit": 4}]}
    run_quietly(recipe)
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    best = state["best_model_checkpoint"]
    assert best == str(tmp_path / "run" / "checkpoint-6") and integrity_error(tmp_path / "run" / "checkpoint-6") is None


def test_a_lock_is_not_kept_by_what_a_killed_run_leaves_behind(tmp_path):
    """A forked data worker has all that its parent had open, and may live on."""
    code = (
        "import os, time\n"
        "from ernie_align.runs.run_dir import RunDirectory\n"
        f"RunDirectory({str(tmp_path)!r}).begin('', resume=False)\n"
        "if not os.fork():\n"
        "    print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            os.kill(worker, 0)  # it lives
            RunDirectory(tmp_path).begin("", resume=False)
        finally:
            os.kill(worker, signal.SIGKILL)


def test_numbers_that_are_no_numbers_name_the_checkpoint_to_go_on_from(of, tmp_path):
    recipe = of(tmp_path / "run", learning_rate=1e30, max_grad_norm=0.0, save_steps=1)
    with pytest.raises(RunError, match="whole up to checkpoint-1, from which --resume goes on") as caught:
        run_quietly(recipe)
    assert "step 2: the loss is nan" in str(caught.value) and "rows.jsonl:" in str(caught.value)


# -- several processes ---


of_scenes = pytest.mark.xdist_group("scenes")  # played once, not by each worker


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """What became of several processes (tests.support.scenarios), and the folder with their output."""
    folder = tmp_path_factory.mktemp("scenes")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.scenarios", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "scenes.json").read_text())


@of_scenes
def test_killed_at_random_moments_and_resumed(scenes):
    """Three moments; `python -m tests.support.crash_test` tries as many as you like."""
    for what, told in scenes[1]["killed"]:
        assert not told, f"{what}: {told}"


@of_scenes
def test_data_workers_outlive_a_signal_to_the_whole_group(scenes):
    """Slurm and a terminal's Ctrl-C signal every process of the job; the step's batches are still needed."""
    folder, told = scenes
    assert told["group"]["codes"] == [75], (folder / "group-0.log").read_text()
    assert "after step 2" in (folder / "group-0.log").read_text()


@of_scenes
@pytest.mark.parametrize(("name", "ended"), [("dies", -signal.SIGKILL), ("sleeps", None)])
def test_a_process_that_is_lost_ends_the_others_with_the_step_and_its_number(scenes, name, ended):
    """After ten seconds of waiting, as ddp_timeout says, and ten of asking who is missing; not after half an hour."""
    folder, told = scenes
    log = (folder / f"{name}-0.log").read_text()
    assert told[name]["codes"] == [3, ended], log
    assert told[name]["seconds"] < 120  # on a busy machine, whose steps are slow
    assert "step 4: process 0 of 2 waited in vain for another" in log and "process 1 did not answer" in log
    assert "whole up to checkpoint-2, from which --resume goes on" in log
    assert integrity_error(folder / name / "checkpoint-2", hashes=True) is None


@of_scenes
def test_processes_stop_together_and_go_on_together(scenes):
    """One of the two is signalled; both save at the same step, and end as the run that was never stopped."""
    folder, told = scenes
    assert told["is stopped"]["codes"] == [75, 75], (folder / "is stopped-0.log").read_text()
    assert told["is stopped, resumed"]["codes"] == told["whole of two, resumed"]["codes"] == [0, 0]
    same(folder / "is stopped", folder / "whole of two")
