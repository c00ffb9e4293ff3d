"""The folder of a run: what was asked, what was measured, and which of its checkpoints are whole."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.checkpoints import flush_to_disk, integrity_error, partial_checkpoint
from ernie_align.errors import AlignError, Fault, RunError
from ernie_align.models.distributed.layout import ParallelLayout
from ernie_align.models.environment import environment
from ernie_align.recipe import Recipe, differences, to_yaml
from ernie_align.runs.batch_size import examples_per_step
from ernie_align.runs.distributed import RankGroup

if TYPE_CHECKING:
    from ernie_align.runs.train import Reporter


# A resumed run may end, log, save or evaluate at other steps; everything else must be what it was.
_MAY_CHANGE = re.compile(
    r"run\.dir|training\.(max_steps|num_train_epochs|(logging|save|eval)_\w+|report_to|run_name|dataloader_\w+)"
)

_SHARE_A_STEP = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")

_BEGINNING = {"run.lock", "recipe.yaml", "recipe.resolved.yaml"}  # written before run.json makes a folder a run's


class RunDirectory:
    """One run's folder, held by one process at a time.

    recipe.yaml           as given, with the overrides of the command line
    recipe.resolved.yaml  with every default
    run.json              versions, device, and what the run found out about itself
    coverage.json data.json preview.txt metrics.jsonl
    checkpoint-N/ final/  whole, each with its seal
    checkpoint.partial/ *.partial  being written or removed
    """

    def __init__(self, path: str | Path, *, where: str = "run.dir"):
        self.path = Path(path)
        self.where = where
        self._lock: Any = None

    @property
    def final(self) -> Path:
        """The finished model or adapter."""
        return self.path / "final"

    @property
    def saving(self) -> Path:
        """Where Trainer writes a checkpoint-N before it is whole."""
        return partial_checkpoint(self.path)

    @property
    def cache(self) -> Path:
        """Encoded rows, for as long as the run lasts."""
        return self.path / "cache"

    # -- beginning ----------------------------------------------------------------------------------------------

    def begin(self, resolved: str, *, resume: bool, examples_a_step: int = 0) -> bool:
        """Take the folder for a run of this resolved recipe. True if there is a run to go on with.

        examples_a_step: of all processes; while it stays, another number of them may go on (0: not known).

        A run that failed before its first step left nothing to keep: another may begin in its folder.
        Raises RunError where the folder is in use, holds something else, holds a finished run, or (resume) a run of
        another recipe. Nothing in it is ever overwritten.
        """
        holds = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        if self.path.exists() and not self.path.is_dir():
            raise RunError.at(self.where, f"{self.path} is a file", fix="name a new folder")
        is_run = "run.json" in holds  # written last of what a beginning writes
        if not is_run and not {name for name in holds if not name.endswith(".partial")} <= _BEGINNING:
            what = f"{self.path} holds something else ({', '.join(holds[:3])})"
            raise RunError.at(self.where, what, fix="name a new folder: nothing is overwritten")
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        if is_run and resume:
            self._same_recipe(resolved, examples_a_step)
            return True
        if is_run and self.final.exists():
            fix = "name a new folder, or remove this one"
            raise RunError.at(self.where, f"{self.path} holds a finished run", fix=fix)
        if is_run and (self.checkpoints() or (self.path / "metrics.jsonl").exists()):
            fix = "go on with --resume, or name a new folder"
            raise RunError.at(self.where, f"{self.path} holds an unfinished run", fix=fix)
        return False

    def _take(self) -> None:
        lock = open(self.path / "run.lock", "a+")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            what = f"{self.path} is in use by {holder}"
            raise RunError.at(self.where, what, fix="wait for it, stop it, or name a new folder") from None
        except OSError as error:
            lock.close()
            what = f"{self.path} cannot be locked: {error.strerror}"
            why = "without a lock two runs could write one folder"
            raise RunError.at(self.where, what, why=why, fix="name a folder on a file system with locks") from None
        # a forked data worker has the lock too, and may outlive a run that was killed
        os.register_at_fork(after_in_child=lock.close)
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        self._lock = lock

    def holder(self) -> str:
        """Which process of which machine took the folder last."""
        lock = self.path / "run.lock"
        return lock.read_text(encoding="utf-8") if lock.exists() else ""

    def is_held_by(self, holder: str, *, patience: float = 60) -> bool:
        """Whether this is the folder that it took, on another machine perhaps. Asks for so many seconds: NFS shows a
        new file late where the folder was looked at before."""
        until = time.monotonic() + patience
        while self.holder() != holder and time.monotonic() < until:
            time.sleep(1)
        return self.holder() == holder

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _same_recipe(self, resolved: str, examples_a_step: int) -> None:
        began = (self.path / "recipe.resolved.yaml").read_text(encoding="utf-8")
        changed = [item for item in differences(began, resolved) if not _MAY_CHANGE.fullmatch(item[0])]
        at_first = self.facts().get("examples_a_step", examples_a_step)
        if at_first == examples_a_step:
            changed = [item for item in changed if item[0] not in _SHARE_A_STEP]
        elif not changed:
            changed = [("examples of a step, of all processes", at_first, examples_a_step)]
        if changed:
            fix = "restore it, or begin anew in another run.dir"
            raise RunError(
                *(Fault(key, f"{new!r} now, {old!r} when the run began", fix=fix) for key, old, new in changed)
            )

    # -- keeping ------------------------------------------------------------------------------------------------

    def write(self, name: str, content: str | Mapping[str, Any] | list[Any]) -> None:
        """Write a small file so that a reader sees the old one or the new one, never half of one."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        flush_to_disk(partial)
        partial.replace(self.path / name)

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.write("run.json", {**self.facts(), **facts})

    def facts(self) -> dict[str, Any]:
        """What run.json holds."""
        path = self.path / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")

    def keep_metrics(self, count: int) -> None:
        """Drop all but the first lines: what follows is of steps that a resumed run takes again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            self.write("metrics.jsonl", "".join(lines[:count]))

    # -- checkpoints --------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """checkpoint-N folders, oldest first, whole or not."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
        return sorted(found, key=step_of)

    def newest_checkpoint(self, *, hashes: bool = False) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and the newer ones passed over, each with the reason.

        hashes: read it to its last byte, instead of looking at its sizes.
        """
        passed_over = []
        for checkpoint in reversed(self.checkpoints()):
            reason = integrity_error(checkpoint, hashes=hashes)
            if reason is None:
                return checkpoint, passed_over
            passed_over.append(f"{checkpoint.name}: {reason}")
        return None, passed_over

    def keep_checkpoint(self, name: str) -> Path:
        """Give a sealed checkpoint its name. One of that name that was passed over makes room."""
        place = self.path / name
        if place.exists():
            self.drop_checkpoint(place)
        (self.saving / name).rename(place)
        self.saving.rmdir()
        flush_to_disk(self.path)
        return place

    def drop_checkpoint(self, checkpoint: Path) -> None:
        """Remove a checkpoint: its name at once, so that no half of it is ever taken for one."""
        doomed = checkpoint.with_name(f"{checkpoint.name}.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)

    def sweep(self) -> list[str]:
        """Remove what a killed run left half-written or half-removed. Its names."""
        folders = [path for path in self.path.glob("*.partial") if path.name.startswith(("checkpoint", "final."))]
        for folder in folders:
            shutil.rmtree(folder)
        for file in self.path.glob(".*.partial"):
            if file.is_file():  # of write(); an export into this folder is a folder itself
                file.unlink()
        return sorted(folder.name for folder in folders)

    def finish(self) -> None:
        """Drop what only a running run needs."""
        shutil.rmtree(self.cache, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """checkpoint-120 -> 120."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def begin_together(
    directory: RunDirectory,
    recipe: Recipe,
    config: Any,
    reporter: Reporter,
    *,
    resume: bool,
    parallel: ParallelLayout | None,
    processes: RankGroup,
) -> None:
    """The first process takes the folder. Where it cannot, none goes on to wait for it."""
    fault: AlignError | None = None
    if processes.is_first:
        try:
            _begin(directory, recipe, reporter, resume=resume, examples_per_step=examples_per_step(config, parallel))
        except AlignError as error:
            fault = error
    may_begin = processes.of_first(fault is None)
    if fault is not None:
        raise fault
    if not may_begin:
        raise RunError.at(directory.where, "the first process could not begin", fix="see what it says")
    holder = processes.of_first(directory.holder())
    is_here = directory.is_held_by(holder)
    if processes.any(not is_here):
        what = f"{directory.path} is not the folder that the first process holds ({holder})"
        what = "another process finds no such folder" if is_here else what
        raise RunError.at(directory.where, what, fix="name a folder on a disk that all machines share")


def _begin(
    directory: RunDirectory, recipe: Recipe, reporter: Reporter, *, resume: bool, examples_per_step: int
) -> None:
    resolved = to_yaml(recipe)
    goes_on = directory.begin(resolved, resume=resume, examples_a_step=examples_per_step)
    for name in directory.sweep():
        reporter.log(f"removed {name}: left by a run that was killed")
    if directory.final.exists():
        directory.finish()
    elif not goes_on:
        directory.write("recipe.yaml", recipe.as_given)
        directory.write("recipe.resolved.yaml", resolved)
        directory.note(environment=environment(), examples_a_step=examples_per_step)


def latest_checkpoint(directory: RunDirectory, reporter: Reporter, processes: RankGroup) -> Path | None:
    """The newest whole checkpoint, if there is one. All processes call it."""
    found = directory.newest_checkpoint(hashes=True) if processes.is_first else None
    checkpoint, passed_over = processes.of_first(found)
    for reason in passed_over:
        reporter.log(f"passed over {reason}")
    reporter.log(f"resuming from {checkpoint}" if checkpoint else "no whole checkpoint: beginning at step 0")
    if processes.is_first:
        directory.keep_metrics(_lines_logged(checkpoint) if checkpoint else 0)
    return checkpoint


def _lines_logged(checkpoint: Path) -> int:
    """Trainer remembers every log of the run, and each of them is a line of metrics.jsonl."""
    return len(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"])
