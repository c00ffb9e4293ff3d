"""Processes forked from one that has imported everything: starting them is fast, and each may be killed."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

LIMIT = 150  # seconds until the processes of a scenario are killed


def import_all() -> None:
    """Import whatever a run imports, once for all forks."""
    import gc

    import trl

    from ernie_align import runs
    from ernie_align.report.console import quiet_libraries

    quiet_libraries()
    assert trl.SFTTrainer and trl.DPOTrainer and runs.run
    gc.collect()
    gc.freeze()  # each training run collects garbage: it need not look through the libraries every time


def fork(work: Callable[[], None], log: Path) -> int:
    """Return the process id of a child that does the work and exits with 0; its output goes to a file."""
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
        traceback.print_exc()
    finally:
        os._exit(code)


class Ranks:
    """Processes of one run, each in a process group of its own, which meet over gloo on the CPU.

    name: of their logs, `name-rank.log`; work: called with the rank.
    """

    def __init__(self, folder: Path, name: str, work: Callable[[int], None], *, count: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def rank_main(rank: int) -> None:
            os.setpgid(0, 0)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            if count > 1:
                os.environ.update({key: str(value) for key, value in (place | address).items()})
            work(rank)

        self.started = time.time()
        self.logs = [folder / f"{name}-{rank}.log" for rank in range(count)]
        self.children = [fork(lambda rank=rank: rank_main(rank), log) for rank, log in enumerate(self.logs)]
        self.codes: list[int | None] = [None] * count

    def wait(self, *, limit: float = LIMIT, only_first: bool = False) -> list[int | None]:
        """Return the exit code of each rank, None for those that were still running and are killed.

        limit: seconds since the start; only_first: wait for rank 0 only.
        """
        while self._is_running(only_first) and time.time() - self.started < limit:
            time.sleep(0.05)
        for rank, child in enumerate(self.children):
            if self.codes[rank] is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        return self.codes

    def _is_running(self, only_first: bool) -> bool:
        for rank, child in enumerate(self.children):
            if self.codes[rank] is None and (ended := os.waitpid(child, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(ended[1])
        return None in (self.codes[:1] if only_first else self.codes)

    @property
    def seconds(self) -> float:
        """Seconds from the start to the last line of rank 0."""
        return self.logs[0].stat().st_mtime - self.started
