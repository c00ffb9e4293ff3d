"""One recipe on several processes: the profiles that say how, and `accelerate launch` with one of them."""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ernie_align.errors import RecipeError

PROFILES = Path(__file__).parent / "profiles"  # recipes/accelerate is a link to it
ENDINGS = "ERNIE_ALIGN_ENDINGS"  # a folder, in which each process writes a file: its id, and what it ends with
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # what ends a process that does not hear it


def profiles() -> list[str]:
    """The names that `--launch` knows."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def profile_path(profile: str) -> Path:
    """A profile by its name, or a file by its path. Raises RecipeError where it is neither."""
    known = PROFILES / f"{profile}.yaml"
    if known.is_file() and profile in profiles():
        return known
    if profile.endswith((".yaml", ".yml", ".json")) and Path(profile).is_file():
        return Path(profile)
    close = difflib.get_close_matches(profile, profiles(), n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    fix = f"{guess}choose from {', '.join(profiles())}, or give the path of a config of accelerate"
    raise RecipeError.at("--launch", f"no profile {profile!r}", fix=fix)


def launch_command(profile: str, processes: int | None, arguments: Sequence[str]) -> list[str]:
    """What `accelerate launch` is called with. arguments: of ernie-align, the verb first."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(profile_path(profile))]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    return [*command, "-m", "ernie_align", *arguments]


def launch(profile: str, processes: int | None, arguments: Sequence[str]) -> int:
    """Run it to its end. What all its processes on this machine end with, where they say it and agree: Accelerate's
    launcher says 1 whatever they say. Otherwise the launcher's own exit status.

    Signals go to the processes themselves, past the launcher, which would die before them, or kill them after 30
    seconds. It has a session of its own, so that a terminal's Ctrl-C comes once.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, ENDINGS: folder}
        command = launch_command(profile, processes, arguments)
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        asked: list[int] = []

        def hand_on(number: int, frame: Any) -> None:
            asked.append(number)
            running = [int(path.name) for path in Path(folder).iterdir() if not path.read_text()]
            for process in running:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            if not running:  # none has begun yet, or all have ended
                with suppress(ProcessLookupError):
                    os.killpg(launcher.pid, number)

        heard = [one for one in HANDED_ON if signal.getsignal(one) != signal.SIG_IGN]  # nohup ignores one
        before = {one: signal.signal(one, hand_on) for one in heard}
        try:
            code = launcher.wait()
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
        said = {path.read_text() for path in Path(folder).iterdir()}
    if asked:  # the launcher may end the last of them while it says goodbye; unasked, it ends them where one died
        said.discard("")
    if code and len(said) == 1 and said != {""}:
        return int(said.pop())
    return code if code >= 0 else 128 - code


def tell_launcher(code: int | None = None) -> None:
    """In a process that `launch` began, whoever else stands between: that it is there, and at its end its exit code."""
    folder = os.environ.get(ENDINGS)
    if folder and Path(folder).is_dir():  # gone with a launch that was killed
        (Path(folder) / str(os.getpid())).write_text("" if code is None else str(code))
