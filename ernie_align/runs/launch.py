"""One recipe on several processes: the profiles that say how, and `accelerate launch` with one of them."""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ernie_align.errors import RecipeError

PROFILES = Path(__file__).parent / "profiles"  # recipes/accelerate is a link to it


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
    """Run it to its end. The exit status of the launcher."""
    return subprocess.run(launch_command(profile, processes, arguments)).returncode
