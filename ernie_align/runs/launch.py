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
# A folder, in which each process writes a file by its number on this machine: its id, and at its end its exit code. One
# that is started anew writes over what the one before it said.
ENDINGS = "ERNIE_ALIGN_ENDINGS"
EXIT_STOPPED = 75  # by a signal, and saved
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


def launch_command(
    profile: str, processes: int | None, arguments: Sequence[str], launcher: Sequence[str] = ()
) -> list[str]:
    """What `accelerate launch` is called with. arguments: of ernie-align, the verb first; launcher: its own, which go
    before those of the profile."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(profile_path(profile))]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    return [*command, *launcher, "-m", "ernie_align", *arguments]


def launch(profile: str, processes: int | None, arguments: Sequence[str], launcher: Sequence[str] = ()) -> int:
    """Run it to its end; arguments as in launch_command. What all its processes on this machine end with, where they
    say it and agree: Accelerate's launcher says 1 whatever they say. Otherwise the launcher's own exit status.

    Signals go to the processes themselves, past the launcher, which would die before them, or kill them after 30
    seconds. It has a session of its own, so that a terminal's Ctrl-C comes once. Where it starts processes anew
    (--max_restarts), one that was stopped tells it 0, and the truth here.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, ENDINGS: folder}
        command = launch_command(profile, processes, arguments, launcher)
        agent = subprocess.Popen(command, env=environment, start_new_session=True)
        asked: list[int] = []

        def hand_on(number: int, frame: Any) -> None:
            asked.append(number)
            reached = 0
            for process, code in _endings(folder):
                if not code:
                    with suppress(ProcessLookupError):
                        os.kill(int(process), number)
                        reached += 1
            if not reached:  # none has begun yet, or all have ended
                with suppress(ProcessLookupError):
                    os.killpg(agent.pid, number)

        heard = [one for one in HANDED_ON if signal.getsignal(one) != signal.SIG_IGN]  # nohup ignores one
        before = {one: signal.signal(one, hand_on) for one in heard}
        try:
            code = agent.wait()
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
        said = {code for _, code in _endings(folder)}
    if asked:  # the launcher may end the last of them while it says goodbye; unasked, it ends them where one died
        said.discard("")
    if said == {str(EXIT_STOPPED)} or (code and len(said) == 1 and said != {""}):
        return int(said.pop())
    return code if code >= 0 else 128 - code


def _endings(folder: str) -> list[tuple[str, str]]:
    """Of each process: its id, and its exit code or nothing."""
    told = [path.read_text().split() for path in Path(folder).iterdir()]
    return [(words[0], words[1] if len(words) > 1 else "") for words in told if words]


def report_exit_code(code: int | None = None) -> int | None:
    """In a process that `launch` began, whoever else stands between: that it is there, and at its end its exit code.

    Returns the one to exit with: 0 of a process that was stopped, where torch's agent would start it anew.
    """
    folder = os.environ.get(ENDINGS)
    if not folder or not Path(folder).is_dir():  # gone with a launch that was killed
        return code
    told = str(os.getpid()) if code is None else f"{os.getpid()} {code}"
    (Path(folder) / os.environ.get("LOCAL_RANK", "0")).write_text(told)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return 0 if code == EXIT_STOPPED and restarts else code
