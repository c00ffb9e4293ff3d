"""Scenarios of several processes, forked from one that has imported everything.

    python -m tests.support.scenarios FOLDER

Leaves the exit codes of each scenario and the seconds it took in scenarios.json, and the output of its processes in
files.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.crash_test import CrashTest, make, recipe_for
from tests.support.processes import LIMIT, Ranks, fork, import_all

TIMEOUT = 10  # ddp_timeout in seconds, for the rank that waits for one that hangs


def run_cli(
    recipe: dict[str, Any], *, step: int = -1, act: Callable[[], None] | None = None, resume: bool = False
) -> None:
    """Run a recipe as the command line does, exit code included. act: done before the batch that follows a step."""
    from ernie_align import cli, runs
    from tests.support.callbacks import At, RecordingReporter

    callbacks = [At(step, lambda **_: act())] if act is not None else []
    cli.app = lambda: runs.run(runs.load_recipe(recipe), resume=resume, reporter=RecordingReporter(*callbacks))
    try:
        cli.main()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code)


def main(folder: Path) -> None:
    """Play all scenarios."""
    import_all()
    os.waitpid(fork(lambda: make("dense", folder), folder / "made.log"), 0)

    def recipe(name: str, **training: Any) -> dict[str, Any]:
        made = recipe_for("lora", "dense", folder, folder / name)
        made["training"] |= {
            "per_device_train_batch_size": 2,
            "ddp_timeout": TIMEOUT if name == "hangs" else LIMIT,
            "eval_steps": 100,  # a stop skips the evaluation of its step, and the random numbers it would draw
            **training,
        }
        return made

    def ranks(name: str, act: Callable[[], None] | None = None, *, resume: bool = False) -> Ranks:
        """Start two ranks; the second acts after three steps."""
        return Ranks(
            folder,
            name,
            lambda rank: run_cli(recipe(name), step=3, act=act if rank == 1 else None, resume=resume),
            count=2,
        )

    results: dict[str, Any] = {}

    def record(name: str, processes: Ranks, **how: Any) -> None:
        results[name] = {"codes": processes.wait(**how), "seconds": processes.seconds}

    hanging = ranks("hangs", lambda: time.sleep(1000))  # its waits leave the processors to the others
    one = recipe("group", dataloader_num_workers=1)
    stop_all = {"step": 1, "act": lambda: os.killpg(0, signal.SIGTERM)}
    record("group", Ranks(folder, "group", lambda rank: run_cli(one, **stop_all), count=1))
    record("dies", ranks("dies", lambda: os.kill(os.getpid(), signal.SIGKILL)))
    record("is stopped", ranks("is stopped", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    record("is stopped, resumed", ranks("is stopped", resume=True))
    record("never stopped", ranks("never stopped"))
    record("hangs", hanging, only_first=True)
    test = CrashTest("lora", "dense", folder, random.Random(time.time()))
    results["killed"] = [test.kill_and_resume(number) for number in range(3)]
    (folder / "scenarios.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
