"""kill -9 at random moments of a run, saving included, then --resume: does it end as the run that was never killed?

    python -m tests.support.crash_test --stage lora --family dense --kills 30

Each moment has a run of its own, killed once (or --times) and resumed to its end. Two thirds of the moments are file
operations of the run in its own folder, chosen at random, at the operation or up to 30 ms after it; one third is chosen
by time. At the end, weights must be equal bit for bit, metrics.jsonl must hold every line once, and nothing incomplete
may be left. Runs are forked from one process, so that the libraries are imported once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.processes import fork, import_all

FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
DELAY = 0.03  # seconds after a file operation: while the libraries below Python write
# keys of metrics.jsonl that are measured, or counted since the process was started
_MEASURED = ("seconds", "peak_memory_gb", "runtime", "per_second", "train_loss", "num_tokens")
_CHECKPOINTS = ["checkpoint-6", "checkpoint-8"]  # of a finished run

Outcome = tuple[dict[str, Any], list[dict[str, Any]], list[str]]


def recipe_for(stage: str, family: str, folder: Path, run_dir: Path) -> dict[str, Any]:
    """Eight steps over six batches an epoch, a checkpoint every two, the last two kept, an evaluation at the fourth."""
    from tests.support.runs import recipe_of

    rows = folder / "digits" / "val.jsonl" if family == "vl_moe" else folder / "rows.jsonl"
    recipe = recipe_of(stage, folder / family, rows, run_dir)
    recipe["data"]["train"][0]["limit"] = 24
    recipe["data"]["eval"] = [{"path": str(rows), "limit": 4}]
    recipe["training"] |= {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "eval_steps": 4,
        "lr_scheduler_type": "cosine",
    }  # fmt: skip
    if stage == "lora" and family == "dense":
        recipe["adapter"]["dropout"] = 0.1  # draws from the generator that a resume must restore
    return recipe


def make(family: str, folder: Path) -> None:
    """Write a tiny checkpoint and its rows."""
    from ernie_align.tiny import make_checkpoint, make_digits
    from ernie_align.tiny.tokenizer import NUMBERS
    from tests.support.runs import write_rows

    make_checkpoint(family, folder / family)
    if family == "vl_moe":
        make_digits(folder / "digits")
        return
    texts = [(NUMBERS[number % 19], " plus ".join(NUMBERS[: 1 + number % 5])) for number in range(24)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    write_rows(folder / "rows.jsonl", [{"messages": messages} for messages in turns])


def run(recipe: dict[str, Any], *, resume: bool = False, on_operation: Callable[[int], None] | None = None) -> None:
    """Run a recipe. on_operation: called with the number of each file operation in its folder, from 1."""
    from tests.support.runs import run_quietly

    if on_operation is not None:
        folder, count = recipe["run"]["dir"], 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in FILE_OPERATIONS and str(arguments[0]).startswith(folder):
                count += 1
                on_operation(count)

        sys.addaudithook(hook)
    run_quietly(recipe, resume=resume)


def kill(after: float = 0.0) -> None:
    """End this process as kill -9 does. after: seconds from now."""
    if after:
        threading.Timer(after, kill).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def outcome(run_dir: Path) -> Outcome:
    """Return weights, lines of metrics.jsonl without measured values, and files that should have been removed."""
    from tests.support.runs import tensors_of

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    computed = [{key: line[key] for key in line if not key.endswith(_MEASURED)} for line in lines]
    leftovers = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*partial*")]
    leftovers += [str(path.name) for path in run_dir.glob("cache")]
    checkpoints = sorted(path.name for path in run_dir.glob("checkpoint-*"))
    return tensors_of(run_dir / "final"), computed, leftovers + (checkpoints if checkpoints != _CHECKPOINTS else [])


def difference(expected: Outcome, actual: Outcome) -> str:
    """Describe how two outcomes differ, or return nothing."""
    import torch

    (weights, metrics, _), (other_weights, other_metrics, leftovers) = expected, actual
    same_names = weights.keys() == other_weights.keys()
    if not same_names or not all(torch.equal(weights[name], other_weights[name]) for name in weights):
        return "other weights"
    if metrics != other_metrics:
        pairs = zip(metrics, other_metrics, strict=False)
        return f"other metrics: {next((pair for pair in pairs if pair[0] != pair[1]), 'their number')}"
    return f"left behind: {leftovers}" if leftovers else ""


class CrashTest:
    """One run that is never killed, and any number of runs that are.

    folder: what make() wrote; generator: draws the moments.
    """

    def __init__(self, stage: str, family: str, folder: Path, generator: random.Random):
        self.stage, self.family, self.folder, self.generator = stage, family, folder, generator
        counter = folder / "operations"
        started = time.monotonic()
        code = self._run("whole", on_operation=lambda count: counter.write_text(str(count)))
        if code:
            raise AssertionError((folder / "whole.log").read_text())
        self.seconds, self.operations = time.monotonic() - started, int(counter.read_text())
        self.expected = outcome(folder / "whole")
        if self.expected[2] or len(self.expected[0]) == 0 or len({line["step"] for line in self.expected[1]}) != 8:
            raise AssertionError(f"the run to compare with is not sound: it left {self.expected[2]}")

    def kill_and_resume(self, number: int, times: int = 1) -> tuple[str, str]:
        """Kill a run and resume it to its end. Returns when it was killed, and how its outcome differs, if it does."""
        name = f"run-{number}"
        while None in (moments := [self._kill(name, number % 3, resume=attempt > 0) for attempt in range(times)]):
            shutil.rmtree(self.folder / name)  # the run was over before its moment came: draw another
        folders = sorted(path.name for path in (self.folder / name).glob("*") if path.is_dir())
        code = self._run(name, resume=True)
        problem = "does not resume" if code else difference(self.expected, outcome(self.folder / name))
        if problem:
            problem += "\n" + (self.folder / f"{name}.log").read_text()
        else:
            shutil.rmtree(self.folder / name)
        return f"killed {', '.join(moments)}; it had {' '.join(folders) or 'nothing'}", problem

    def _run(self, name: str, *, resume: bool = False, kill_after: float | None = None, **options: Any) -> int:
        recipe = recipe_for(self.stage, self.family, self.folder, self.folder / name)
        child = fork(lambda: run(recipe, resume=resume, **options), self.folder / f"{name}.log")
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    def _kill(self, name: str, kind: int, *, resume: bool) -> str | None:
        """Run until a random moment. Returns the moment, None if the run was over by then."""
        at = self.generator.randrange(1, self.operations + 1)
        upper = (0.0, DELAY, self.seconds)[kind]
        after = self.generator.uniform(0, upper)
        if kind == 2:
            code = self._run(name, resume=resume, kill_after=after)
            moment = f"after {after:.2f} s"
        else:
            code = self._run(name, resume=resume, on_operation=partial(_kill_at, at=at, after=after))
            moment = f"at operation {at}" + (f" + {after:.3f} s" if after else "")
        return moment if os.WIFSIGNALED(code) else None


def _kill_at(count: int, *, at: int, after: float) -> None:
    if count == at:
        kill(after)


def main() -> int:
    """Return exit code 1 if any run differs."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--stage", choices=("lora", "sft"), default="lora")
    options.add_argument("--family", choices=("dense", "moe", "vl_moe"), default="dense")
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--times", type=int, default=1, help="how often each run is killed")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    import_all()
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    os.waitpid(fork(lambda: make(chosen.family, folder), folder / "made.log"), 0)
    test = CrashTest(chosen.stage, chosen.family, folder, random.Random(chosen.seed))
    print(f"never killed: {test.seconds:.1f} s, {test.operations} file operations in its folder", flush=True)
    failed = 0
    for number in range(chosen.kills):
        moment, problem = test.kill_and_resume(number, chosen.times)
        failed += bool(problem)
        print(f"{number + 1:3} {moment}: {problem or 'the same'}", flush=True)
    print(f"{chosen.kills - failed} of {chosen.kills} ended as the run that was never killed")
    shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
