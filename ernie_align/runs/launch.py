"""`--launch`: run one recipe on several processes with `accelerate launch`, with signals and exit codes passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ernie_align.errors import RecipeError, did_you_mean

PROFILES = Path(__file__).parent / "profiles"  # recipes/accelerate is a link to it
# Names a folder with a file for each local rank: its process id, followed at its end by its exit code. A process that
# is restarted overwrites the file of the one before it.
_STATUS_FOLDER = "ERNIE_ALIGN_STATUS_FOLDER"
EXIT_STOPPED = 75  # stopped by a signal, with a checkpoint
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def profiles() -> list[str]:
    """Return the names that `--launch` accepts."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def profile_path(profile: str) -> Path:
    """Return the file of a profile, given its name or a path. Raises RecipeError if it is neither."""
    known = PROFILES / f"{profile}.yaml"
    if known.is_file() and profile in profiles():
        return known
    if profile.endswith((".yaml", ".yml", ".json")) and Path(profile).is_file():
        return Path(profile)
    why = f"choose from {', '.join(profiles())}, or give the path of an Accelerate config"
    raise RecipeError.at("--launch", f"unknown profile {profile!r}", why=why, fix=did_you_mean(profile, profiles()))


def launch_command(
    profile: str, processes: int | None, arguments: Sequence[str], launcher: Sequence[str] = ()
) -> list[str]:
    """Return the command line of `accelerate launch`.

    arguments: of ernie-align, with the command first; launcher: options of accelerate launch, which override the
    profile's.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(profile_path(profile))]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    return [*command, *launcher, "-m", "ernie_align", *arguments]


def launch(profile: str, processes: int | None, arguments: Sequence[str], launcher: Sequence[str] = ()) -> int:
    """Run launch_command to its end and return the exit code of the run.

    This is the exit code of all local ranks if each has reported one and they agree, because Accelerate's launcher
    always reports 1; otherwise the launcher's own.
    Signals go to the ranks directly: the launcher would die before them, or kill them after 30 seconds. It gets its own
    session, so that a terminal's Ctrl-C arrives once. If it restarts processes (--max_restarts), a stopped rank exits
    with 0 and reports the real code here.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, _STATUS_FOLDER: folder}
        command = launch_command(profile, processes, arguments, launcher)
        agent = subprocess.Popen(command, env=environment, start_new_session=True)
        received: list[int] = []

        def forward(number: int, frame: Any) -> None:
            received.append(number)
            running = [process for process, code in _statuses(folder) if not code]
            reached = 0
            for process in running:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
                    reached += 1
            if not reached:  # no rank has started yet, or all have ended
                with suppress(ProcessLookupError):
                    os.killpg(agent.pid, number)

        handled = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        before = {number: signal.signal(number, forward) for number in handled}
        try:
            code = agent.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        reported = {code for _, code in _statuses(folder)}
    if received:  # after a signal, the launcher may kill the last ranks while they exit; without one, only if one died
        reported.discard(None)
    if reported == {EXIT_STOPPED} or (code and len(reported) == 1 and reported != {None}):
        return reported.pop()
    return code if code >= 0 else 128 - code


def _statuses(folder: str) -> list[tuple[int, int | None]]:
    """Process id and exit code (None: running, or killed) of each local rank."""
    words = [path.read_text().split() for path in Path(folder).iterdir()]
    return [(int(process), int(code[0]) if code else None) for process, *code in filter(None, words)]


def report_exit_code(code: int | None = None) -> int | None:
    """Report to `launch`, if it started this process, that the process runs (None) or the code it exits with.

    Returns the code to exit with: 0 for a stopped run that torch's agent would otherwise restart.
    """
    folder = os.environ.get(_STATUS_FOLDER)
    if not folder or not Path(folder).is_dir():  # removed when the launch was killed
        return code
    status = str(os.getpid()) if code is None else f"{os.getpid()} {code}"
    (Path(folder) / os.environ.get("LOCAL_RANK", "0")).write_text(status)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return 0 if code == EXIT_STOPPED and restarts else code
