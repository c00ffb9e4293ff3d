"""Scenes of several processes, forked from one that has imported everything: `python -m tests.support.scenarios <folder>`.

Each scene leaves the exit codes of its processes and the seconds it took in scenes.json, and their output in files.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.crash_test import Trial, forked, import_all, make, recipe_for

LIMIT = 150  # seconds until a process that is left is killed
PATIENCE = 10  # seconds that one process waits for another that sleeps (ddp_timeout)


def processes(
    folder: Path, name: str, work: Callable[[int], None], *, count: int, only_first: bool = False
) -> dict[str, Any]:
    """So many processes in groups of their own, which gloo joins. Those that are left after LIMIT are killed.

    only_first: wait for the first alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()

    def process(rank: int) -> None:
        os.setpgid(0, 0)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        if count > 1:
            os.environ.update({key: str(value) for key, value in (place | address).items()})
        work(rank)

    children = [forked(lambda rank=rank: process(rank), folder / f"{name}-{rank}.log") for rank in range(count)]
    codes: list[int | None] = [None] * count
    while None in (codes[:1] if only_first else codes) and time.monotonic() - began < LIMIT:
        for rank, child in enumerate(children):
            if codes[rank] is None and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.05)
    for rank, child in enumerate(children):
        if codes[rank] is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return {"codes": codes, "seconds": time.monotonic() - began}


def train(
    recipe: dict[str, Any], *, step: int = -1, act: Callable[[], None] | None = None, resume: bool = False
) -> None:
    """The run, with the exit code that the command line would have. act: done before the batch after a step."""
    from ernie_align import cli, runs
    from ernie_align.runs.callbacks import graceful_stop
    from tests.support.runs import Reporter

    class Acting(graceful_stop.GracefulStop):  # the one callback that every process has
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step and act is not None:
                act()

    graceful_stop.GracefulStop = Acting
    cli.app = lambda: runs.run(runs.load_recipe(recipe), resume=resume, reporter=Reporter())
    try:
        cli.main()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code)


def main(folder: Path) -> None:
    """Play all scenes."""
    import_all()
    os.waitpid(forked(lambda: make("dense", folder), folder / "made.log"), 0)

    def recipe(name: str, **training: Any) -> dict[str, Any]:
        made = recipe_for("lora", "dense", folder, folder / name)
        made["training"] |= {
            "per_device_train_batch_size": 2,
            "ddp_timeout": PATIENCE if name == "sleeps" else LIMIT,
            "eval_steps": 100,  # a stop leaves out the evaluation of its step, and the random numbers it would draw
            **training,
        }
        return made

    told = {}
    group = recipe("group", dataloader_num_workers=1)
    told["group"] = processes(
        folder, "group", lambda rank: train(group, step=1, act=lambda: os.killpg(0, signal.SIGTERM)), count=1
    )
    acts = {
        "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "sleeps": lambda: time.sleep(1000),
        "is stopped": lambda: os.kill(os.getpid(), signal.SIGTERM),
    }
    for name, act in acts.items():

        def work(rank: int, name: str = name, act: Callable[[], None] = act) -> None:
            train(recipe(name), step=3, act=act if rank == 1 else None)

        told[name] = processes(folder, name, work, count=2, only_first=name == "sleeps")
    for name in ("is stopped", "whole of two"):
        told[f"{name}, resumed"] = processes(
            folder, name, lambda rank, name=name: train(recipe(name), resume=True), count=2
        )
    trial = Trial("lora", "dense", folder, random.Random(time.time()))
    told["killed"] = [trial.killed(number) for number in range(3)]
    (folder / "scenes.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
