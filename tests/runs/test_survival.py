"""However a run ends, complete checkpoints are kept, the error names the one to resume from, and resuming is exact."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from ernie_align.checkpoints import MANIFEST, integrity_error
from ernie_align.errors import Interrupted, RunError
from ernie_align.runs import load_recipe, run
from ernie_align.runs.run_dir import RunDirectory
from tests.support.callbacks import At, RecordingReporter, send_signal
from tests.support.runs import assert_same_run, recipe_of, run_quietly, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    row = {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "one"}]}
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [row] * 24)


@pytest.fixture(scope="module")
def recipe_in(checkpoints, rows):
    """Run directory -> a recipe of six steps with a checkpoint at the third."""

    def make(run_dir, **training):
        recipe = recipe_of("lora", checkpoints["dense"], rows, run_dir)
        recipe["training"] |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **training}
        return recipe

    return make


@pytest.fixture(scope="module")
def whole(recipe_in, tmp_path_factory):
    """The run that is not disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_quietly(recipe_in(run_dir))
    return run_dir


# -- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_running_step(recipe_in, whole, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run(load_recipe(recipe_in(tmp_path / "run")), reporter=RecordingReporter(At(4, send_signal(number))))
    assert f"stopped by {number.name} after step 5" in str(caught.value)
    assert "--resume continues from checkpoint-5" in str(caught.value)
    assert integrity_error(tmp_path / "run" / "checkpoint-5", hashes=True) is None
    assert signal.getsignal(number) == before
    run_quietly(recipe_in(tmp_path / "run"), resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_the_second_interrupt_does_not_wait(recipe_in, tmp_path):
    def twice(**_):
        send_signal(signal.SIGINT)()
        send_signal(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe_in(tmp_path / "run")), reporter=RecordingReporter(At(1, twice)))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_signal_before_the_first_step_leaves_no_obstacle(recipe_in, tmp_path):
    class Early(RecordingReporter):
        def sources(self, counts):
            send_signal()()

    with pytest.raises(Interrupted, match="outside of training"):
        run(load_recipe(recipe_in(tmp_path / "run")), reporter=Early())
    assert run_quietly(recipe_in(tmp_path / "run", max_steps=1)).final.exists()


@pytest.mark.parametrize("step", [2, 6])
def test_a_signal_stops_an_evaluation_and_saves_the_step(recipe_in, rows, whole, tmp_path, step):
    """At step 2 no checkpoint was due; at step 6, in the evaluation at the end, it was saved before."""
    recipe = recipe_in(tmp_path / "run", eval_strategy="steps", eval_steps=2 if step == 2 else 100)
    recipe["data"] = {**recipe["data"], "eval": [{"path": str(rows), "limit": 8}]}
    with pytest.raises(Interrupted, match=f"after step {step}"):
        run(load_recipe(recipe), reporter=RecordingReporter(At(step, send_signal(), "on_prediction_step")))
    assert integrity_error(tmp_path / "run" / f"checkpoint-{step}") is None
    run_quietly(recipe, resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_the_command_line_has_an_exit_code_for_stopped_runs(recipe_in, tmp_path, monkeypatch, capsys):
    import torch

    from ernie_align import cli

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_in(tmp_path / "run", max_steps=2)))
    monkeypatch.setattr(sys, "argv", ["ernie-align", "lora", str(tmp_path / "recipe.yaml")])

    def interrupt(module, args):
        handle.remove()
        send_signal()()

    handle = torch.nn.modules.module.register_module_forward_pre_hook(interrupt)  # in the first step
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 75 and "--resume continues from checkpoint-1" in capsys.readouterr().err


# -- the disk


def test_a_full_disk_is_noticed_before_the_old_checkpoint_is_removed(recipe_in, whole, tmp_path, monkeypatch):
    usage = shutil.disk_usage

    def nearly_full(**_):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))

    recipe = recipe_in(tmp_path / "run", save_total_limit=1)
    reporter = RecordingReporter(At(3, nearly_full))
    with pytest.raises(RunError) as caught:
        run(load_recipe(recipe), reporter=reporter)
    error = str(caught.value)
    assert "the checkpoint of step 6 needs" in error and "0.000 GB are free" in error
    assert "--resume continues from checkpoint-3" in error
    assert not (tmp_path / "run" / "checkpoint.partial").exists()
    monkeypatch.undo()
    run_quietly(recipe, resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_disk_without_room_is_reported_one_checkpoint_ahead(recipe_in, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    fill = At(3, lambda **_: monkeypatch.setattr(shutil, "disk_usage", lambda path: full), "on_save")
    reporter = RecordingReporter(fill)
    with pytest.raises(RunError):
        run(load_recipe(recipe_in(tmp_path / "run")), reporter=reporter)
    assert any(line.startswith("step 3: the next checkpoint needs") for line in reporter.lines)


@pytest.mark.parametrize("size", [2_000, 100_000])
def test_a_disk_that_fills_during_a_write(recipe_in, whole, tmp_path, size):
    """In a small file of Python, and in a large one of torch or safetensors, whose errors have no errno."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(RunError) as caught:
            full = At(5, lambda **_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)))
            run(load_recipe(recipe_in(tmp_path / "run")), reporter=RecordingReporter(full))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = str(caught.value)
    assert "the checkpoint of step 6 could not be written" in error
    assert "--resume continues from checkpoint-3" in error
    assert not (tmp_path / "run" / "checkpoint.partial").exists()
    run_quietly(recipe_in(tmp_path / "run"), resume=True)
    assert_same_run(tmp_path / "run", whole)


# -- checkpoints


@pytest.fixture
def stopped(whole, recipe_in, tmp_path):
    """The run without its final folder, and its recipe."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run", recipe_in(tmp_path / "run")


def test_a_flipped_bit_is_found_and_the_checkpoint_skipped(stopped, whole):
    run_dir, recipe = stopped
    path = run_dir / "checkpoint-6" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    reporter = RecordingReporter()
    run(load_recipe(recipe), resume=True, reporter=reporter)
    line = "skipped checkpoint-6: optimizer.pt changed since it was written: its sha256 differs"
    assert line in reporter.lines and f"resuming from {run_dir / 'checkpoint-3'}" in reporter.lines
    assert integrity_error(run_dir / "checkpoint-6", hashes=True) is None  # written again
    assert_same_run(run_dir, whole)


def test_incomplete_folders_are_never_taken_for_checkpoints(stopped, whole):
    """As left by a kill during a save, during a removal, and at the very end."""
    run_dir, recipe = stopped
    shutil.copytree(run_dir / "checkpoint-3", run_dir / "checkpoint.partial" / "checkpoint-6")
    (run_dir / "checkpoint-6" / MANIFEST).unlink()
    (run_dir / "checkpoint-6").rename(run_dir / "checkpoint-6.partial")
    shutil.copytree(run_dir / "checkpoint-3", run_dir / "final.partial")
    (run_dir / "metrics.jsonl").write_text((run_dir / "metrics.jsonl").read_text() + '{"step": 7, "lo')
    reporter = RecordingReporter()
    run(load_recipe(recipe), resume=True, reporter=reporter)
    for name in ("checkpoint.partial", "checkpoint-6.partial", "final.partial"):
        assert f"removed {name}, left by a run that was killed" in reporter.lines
    assert not list(run_dir.rglob("*.partial"))
    assert integrity_error(run_dir / "final", hashes=True) is None
    assert_same_run(run_dir, whole)


def test_a_run_killed_after_its_last_step_takes_no_other(recipe_in, tmp_path):
    """In the middle of an epoch Trainer would: it checks only after a step if it should stop."""
    recipe = recipe_in(tmp_path / "whole", max_steps=4, save_steps=2)
    run_quietly(recipe)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    reporter = RecordingReporter()
    run(load_recipe({**recipe, "run": {"dir": str(tmp_path / "run")}}), resume=True, reporter=reporter)
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-4'}" in reporter.lines
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_best_checkpoint_is_recorded_at_its_final_place(recipe_in, rows, tmp_path):
    """Trainer records where it wrote the checkpoint, before it was moved."""
    training = {"eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 1, "load_best_model_at_end": True}
    recipe = recipe_in(tmp_path / "run", **training)
    recipe["data"] = {**recipe["data"], "eval": [{"path": str(rows), "limit": 4}]}
    run_quietly(recipe)
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    best = state["best_model_checkpoint"]
    assert best == str(tmp_path / "run" / "checkpoint-6") and integrity_error(tmp_path / "run" / "checkpoint-6") is None


def test_a_data_worker_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path):
    """A forked worker inherits all open files of its parent."""
    code = (
        "import os, time\n"
        "from ernie_align.runs.run_dir import RunDirectory\n"
        f"run_dir = RunDirectory({str(tmp_path)!r})\n"
        "run_dir.acquire('', resume=False)\n"
        "if not os.fork():\n"
        "    print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            os.kill(worker, 0)  # the worker is alive
            RunDirectory(tmp_path).acquire("", resume=False)
        finally:
            os.kill(worker, signal.SIGKILL)


# -- several processes


in_scenarios = pytest.mark.xdist_group("scenarios")  # played once, not by each worker


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """The outcome of tests.support.scenarios, and the folder with the output of its processes."""
    folder = tmp_path_factory.mktemp("scenarios")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.scenarios", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "scenarios.json").read_text())


@in_scenarios
def test_killed_at_random_moments_and_resumed(scenarios):
    """Three moments; `python -m tests.support.crash_test` tries as many as you like."""
    for moment, problem in scenarios[1]["killed"]:
        assert not problem, f"{moment}: {problem}"


@in_scenarios
def test_data_workers_outlive_a_signal_to_the_whole_group(scenarios):
    """Slurm and a terminal's Ctrl-C signal every process of the job; the running step still needs batches."""
    folder, results = scenarios
    log = (folder / "group-0.log").read_text()
    assert results["group"]["codes"] == [75], log
    assert "after step 2" in log


@in_scenarios
@pytest.mark.parametrize(("name", "code"), [("dies", -signal.SIGKILL), ("hangs", None)])
def test_a_lost_rank_ends_the_others_with_the_step_and_its_number(scenarios, name, code):
    """After ddp_timeout, ten seconds here, and ten more to find out who is missing; not after half an hour."""
    folder, results = scenarios
    log = (folder / f"{name}-0.log").read_text()
    assert results[name]["codes"] == [3, code], log
    assert results[name]["seconds"] < 120  # on a busy machine, whose steps are slow
    assert "step 4: rank 0 of 2 lost contact with another rank" in log and "rank 1 did not answer" in log
    assert "--resume continues from checkpoint-2" in log
    assert integrity_error(folder / name / "checkpoint-2", hashes=True) is None


@in_scenarios
def test_ranks_stop_together_and_resume_together(scenarios):
    """One of two is signaled; both save at the same step, and end as the run that was never stopped."""
    folder, results = scenarios
    assert results["is stopped"]["codes"] == [75, 75], (folder / "is stopped-0.log").read_text()
    assert results["is stopped, resumed"]["codes"] == results["never stopped"]["codes"] == [0, 0]
    assert_same_run(folder / "is stopped", folder / "never stopped")
