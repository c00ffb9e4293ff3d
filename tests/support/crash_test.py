"""kill -9 at random moments of a run, saving included, then --resume: is it the run that was never killed?

    python -m tests.support.crash_test --stage lora --family dense --kills 30

Each moment has a run of its own, killed once (or --again times) and resumed to its end. Two thirds of the moments are
file operations of the run in its own folder, chosen among all of them, at the operation or up to 30 ms after it; one
third is chosen by time. At the end weights must be equal bit for bit, metrics.jsonl must hold every line once, and
nothing half-written may be left. Runs are forked from one process, so that the libraries are imported once.
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

FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
LATER = 0.03  # seconds after a file operation: where the libraries below Python write
# of a line of metrics: what is measured, not computed; and what Trainer and TRL count since they were started
_CHANGES = ("seconds", "peak_memory_gb", "runtime", "per_second", "train_loss", "num_tokens")


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
    """A tiny checkpoint and its rows."""
    from ernie_align.tiny import make_checkpoint, make_digits
    from ernie_align.tiny.tokenizer import NUMBERS
    from tests.support.runs import write_rows

    make_checkpoint(family, folder / family)
    if family == "vl_moe":
        make_digits(folder / "digits")
        return
    asked = [(NUMBERS[number % 19], " plus ".join(NUMBERS[: 1 + number % 5])) for number in range(24)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in asked]
    write_rows(folder / "rows.jsonl", [{"messages": messages} for messages in turns])


def forked(work: Callable[[], None], log: Path) -> int:
    """The process id of a child that does the work and ends with 0."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def run(recipe: dict[str, Any], *, resume: bool = False, on_operation: Callable[[int], None] | None = None) -> None:
    """The run itself. on_operation: told the number of each file operation in its folder, from 1."""
    from tests.support.runs import run_quietly

    if on_operation is not None:
        place, count = recipe["run"]["dir"], 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in FILE_OPERATIONS and str(arguments[0]).startswith(place):
                count += 1
                on_operation(count)

        sys.addaudithook(hook)
    run_quietly(recipe, resume=resume)


def kill(after: float = 0.0) -> None:
    """End this very process, now or a little later, as kill -9 does."""
    if after:
        threading.Timer(after, kill).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def outcome(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Weights, lines of metrics.jsonl without what is measured, and what should not be there any more."""
    from tests.support.runs import tensors_of

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    computed = [{key: line[key] for key in line if not key.endswith(_CHANGES)} for line in lines]
    left = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*partial*")]
    left += [str(path.name) for path in run_dir.glob("cache")]
    kept = sorted(path.name for path in run_dir.glob("checkpoint-*"))
    return tensors_of(run_dir / "final"), computed, left + [name for name in kept if kept != KEPT]


KEPT = ["checkpoint-6", "checkpoint-8"]


def same(one: tuple, other: tuple) -> str:
    """What differs, or nothing."""
    import torch

    (weights, metrics, _), (found, lines, left) = one, other
    if weights.keys() != found.keys() or not all(torch.equal(weights[name], found[name]) for name in weights):
        return "other weights"
    if metrics != lines:
        odd = next((pair for pair in zip(metrics, lines, strict=False) if pair[0] != pair[1]), "their number")
        return f"other metrics: {odd}"
    return f"left behind: {left}" if left else ""


class Trial:
    """One run that was never killed, and any number of runs that are.

    folder: with what make() made; draw: the moments.
    """

    def __init__(self, stage: str, family: str, folder: Path, draw: random.Random):
        self.stage, self.family, self.folder, self.draw = stage, family, folder, draw
        counted = folder / "operations"
        began = time.monotonic()
        self._go("whole", on_operation=lambda count: counted.write_text(str(count)), must=True)
        self.length, self.operations = time.monotonic() - began, int(counted.read_text())
        self.expected = outcome(folder / "whole")
        if self.expected[2] or len(self.expected[0]) == 0 or len({line["step"] for line in self.expected[1]}) != 8:
            raise AssertionError(f"no run to compare with: it left {self.expected[2]}")

    def _go(
        self, name: str, *, resume: bool = False, must: bool = False, kill_after: float | None = None, **how
    ) -> int:
        recipe = recipe_for(self.stage, self.family, self.folder, self.folder / name)
        child = forked(lambda: run(recipe, resume=resume, **how), self.folder / f"{name}.log")
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        code = os.waitpid(child, 0)[1]
        if must and code:
            raise AssertionError((self.folder / f"{name}.log").read_text())
        return code

    def killed(self, number: int, again: int = 1) -> tuple[str, str]:
        """What was done to a run, and how it differs at its end: empty if in nothing."""
        name = f"run-{number}"
        while None in (moments := [self._kill(name, number % 3, resume=attempt > 0) for attempt in range(again)]):
            shutil.rmtree(self.folder / name)  # it was over before its moment came: another is drawn
        there = sorted(path.name for path in (self.folder / name).glob("*") if path.is_dir())
        code = self._go(name, resume=True)
        told = "does not resume" if code else same(self.expected, outcome(self.folder / name))
        if told:
            told += "\n" + (self.folder / f"{name}.log").read_text()
        else:
            shutil.rmtree(self.folder / name)
        return f"killed {', '.join(moments)}; it had {' '.join(there) or 'nothing'}", told

    def _kill(self, name: str, kind: int, *, resume: bool) -> str | None:
        """When the run was killed; None if it was over by then."""
        at = self.draw.randrange(1, self.operations + 1)
        after = (0.0, self.draw.uniform(0, LATER), self.draw.uniform(0, self.length))[kind]
        if kind == 2:
            code = self._go(name, resume=resume, kill_after=after)
            when = f"after {after:.2f} s"
        else:
            code = self._go(name, resume=resume, on_operation=partial(_die, at=at, after=after))
            when = f"at operation {at}" + (f" + {after:.3f} s" if after else "")
        return when if os.WIFSIGNALED(code) else None


def _die(count: int, *, at: int, after: float) -> None:
    if count == at:
        kill(after)


def main() -> int:
    """Exit code 1 where a single one differs."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--stage", choices=("lora", "sft"), default="lora")
    options.add_argument("--family", choices=("dense", "moe", "vl_moe"), default="dense")
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--again", type=int, default=1, help="times that each run is killed")
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    import_all()
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    os.waitpid(forked(lambda: make(asked.family, folder), folder / "made.log"), 0)
    trial = Trial(asked.stage, asked.family, folder, random.Random(asked.seed))
    print(f"never killed: {trial.length:.1f} s, {trial.operations} file operations in its folder", flush=True)
    failed = 0
    for number in range(asked.kills):
        what, told = trial.killed(number, asked.again)
        failed += bool(told)
        print(f"{number + 1:3} {what}: {told or 'the same'}", flush=True)
    print(f"{asked.kills - failed} of {asked.kills} ended as the run that was never killed")
    shutil.rmtree(folder)
    return int(failed > 0)


def import_all() -> None:
    """Whatever a run imports, once for all forks."""
    import trl

    from ernie_align import runs
    from ernie_align.report.console import quiet_libraries

    quiet_libraries()
    assert trl.SFTTrainer and runs.run


if __name__ == "__main__":
    sys.exit(main())
