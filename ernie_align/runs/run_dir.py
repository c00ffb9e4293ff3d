"""The folder of a run: its lock, its recipe, its metrics, and which of its checkpoints are complete."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ernie_align.checkpoints import flush_to_disk, integrity_error, partial_checkpoint, write_atomically, write_manifest
from ernie_align.errors import AlignError, Fault, RunError
from ernie_align.models.load import environment
from ernie_align.recipe import Recipe, differences, to_yaml
from ernie_align.runs.distributed import RankGroup

if TYPE_CHECKING:
    from ernie_align.data.load import SourceStats
    from ernie_align.models.trainable_parts import ParameterSummary
    from ernie_align.runs.reporter import Reporter

# Keys that may differ between a run and its resumption: where it ends, logs, saves and evaluates.
_MAY_CHANGE = re.compile(
    r"run\.dir|training\.(max_steps|num_train_epochs|(logging|save|eval)_\w+|report_to|run_name|dataloader_\w+)"
)
# With another number of ranks, these may change as long as the examples per step do not.
_BATCH_SIZE = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")

_BEFORE_RUN_JSON = {"run.lock", "recipe.yaml", "recipe.resolved.yaml"}  # run.json is what makes a folder a run


class RunDirectory:
    """The folder of one run, locked by one process at a time. As a context manager, it releases the lock at exit.

    recipe.yaml           the recipe as given, with the overrides of the command line
    recipe.resolved.yaml  the same with every default
    run.json              versions, device and facts about the run
    coverage.json data.json preview.txt metrics.jsonl
    checkpoint-N/ final/  complete, each with its manifest
    checkpoint.partial/ *.partial  being written or removed
    cache/                encoded rows, removed at the end
    """

    def __init__(self, path: str | Path, *, where: str = "run.dir"):
        self.path = Path(path)
        self.where = where
        self.final = self.path / "final"
        self.saving = partial_checkpoint(self.path)  # Trainer writes checkpoint-N in here
        self.cache = self.path / "cache"
        self._lock: FileLock | None = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    # -- lock and recipe ----------------------------------------------------------------------------------------

    def acquire(self, resolved: str, *, resume: bool, examples_per_step: int = 0) -> bool:
        """Lock the folder for a run of a resolved recipe. Return True if it holds a run to resume.

        examples_per_step: over all ranks; the number of ranks may change while it stays the same (0: not known).
        A run that failed before its first step has left nothing to keep, so another may start in its folder.
        Raises RunError if the folder is in use, holds other files, holds a finished run or, with resume, a run of
        another recipe. Nothing in it is ever overwritten.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError.at(self.where, f"{self.path} is a file", fix="name a new folder")
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        is_run = "run.json" in names
        if not is_run and not {name for name in names if not name.endswith(".partial")} <= _BEFORE_RUN_JSON:
            what = f"{self.path} is not empty and is not a run directory ({', '.join(names[:3])})"
            raise RunError.at(self.where, what, fix="name a new folder: nothing is overwritten")
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire_lock()
        if is_run and resume:
            self._check_same_recipe(resolved, examples_per_step)
            return True
        if is_run and self.final.exists():
            fix = "name a new folder, or remove this one"
            raise RunError.at(self.where, f"{self.path} holds a finished run", fix=fix)
        if is_run and (self.checkpoints() or (self.path / "metrics.jsonl").exists()):
            fix = "continue it with --resume, or name a new folder"
            raise RunError.at(self.where, f"{self.path} holds an unfinished run", fix=fix)
        return False

    def _acquire_lock(self) -> None:
        """Take run.lock. The kernel frees it however this process ends, and forked data workers do not inherit it."""
        lock = FileLock(self.path / "run.lock", thread_local=False, preserve_lock_file=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            what = f"{self.path} is in use by {self.holder() or 'another process'}"
            raise RunError.at(self.where, what, fix="wait for it, stop it, or name a new folder") from None
        except OSError as error:
            what = f"{self.path} cannot be locked: {error.strerror}"
            why = "without a lock, two runs could write to one folder"
            raise RunError.at(self.where, what, why=why, fix="name a folder on a file system with locks") from None
        (self.path / "run.lock").write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        self._lock = lock

    def holder(self) -> str:
        """Return the process and machine that locked the folder last, or nothing."""
        lock = self.path / "run.lock"
        return lock.read_text(encoding="utf-8").strip() if lock.exists() else ""

    def is_held_by(self, holder: str, *, timeout: float = 60) -> bool:
        """Return if this folder was locked by that holder, on another machine perhaps.

        timeout: seconds to wait for it, since NFS shows a new file late in a folder that was listed before.
        """
        until = time.monotonic() + timeout
        while self.holder() != holder and time.monotonic() < until:
            time.sleep(1)
        return self.holder() == holder

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _check_same_recipe(self, resolved: str, examples_per_step: int) -> None:
        before = (self.path / "recipe.resolved.yaml").read_text(encoding="utf-8")
        changed = [item for item in differences(before, resolved) if not _MAY_CHANGE.fullmatch(item[0])]
        first = self.facts().get("examples_a_step", examples_per_step)
        if first == examples_per_step:
            changed = [item for item in changed if item[0] not in _BATCH_SIZE]
        elif not changed:
            changed = [("examples per step, over all processes", first, examples_per_step)]
        if changed:
            fix = "restore the old value, or start a new run in another run.dir"
            raise RunError(
                *(Fault(key, f"{new!r} now, {old!r} when the run started", fix=fix) for key, old, new in changed)
            )

    # -- files --------------------------------------------------------------------------------------------------

    def write(self, name: str, content: str | Mapping[str, Any] | list[Any]) -> None:
        """Write a small file, text or JSON, so that a reader sees the old content or the new, never a part of it."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.path / name, text)

    def facts(self) -> dict[str, Any]:
        """Return the content of run.json."""
        path = self.path / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def add_facts(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.write("run.json", {**self.facts(), **facts})

    def write_overview(
        self, summary: ParameterSummary, counts: list[SourceStats], preview: str, batching: list[str]
    ) -> None:
        """Write what is known before the model is loaded.

        preview: the first example; batching: lines about how rows make up batches.
        """
        if batching:
            self.add_facts(layout=batching)
        self.write("coverage.json", [asdict(row) for row in summary.rows])
        self.write("data.json", [asdict(count) for count in counts])
        self.write("preview.txt", preview)

    def publish_final(self, partial: Path, counts: list[SourceStats], **facts: Any) -> None:
        """Complete the finished model in a folder `partial` with its manifest, and rename it to `final`.

        counts: written once more, since the rows of a stream are counted only by the end.
        """
        write_manifest(partial)
        self.write("data.json", [asdict(count) for count in counts])
        self.add_facts(**facts)
        partial.replace(self.final)
        flush_to_disk(self.path)
        self.remove_cache()

    def remove_cache(self) -> None:
        """Remove the encoded rows."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")

    def truncate_metrics(self, count: int) -> None:
        """Keep the first lines of metrics.jsonl; the others are of steps that a resumed run takes again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            self.write("metrics.jsonl", "".join(lines[:count]))

    # -- checkpoints --------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Return all checkpoint-N folders, oldest first, complete or not."""
        paths = [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
        return sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")))

    def newest_checkpoint(self, *, hashes: bool = False) -> tuple[Path | None, list[str]]:
        """Return the newest complete checkpoint, and the newer ones that were skipped, each with the reason.

        hashes: read every byte of it, instead of comparing sizes.
        """
        skipped = []
        for checkpoint in reversed(self.checkpoints()):
            reason = integrity_error(checkpoint, hashes=hashes)
            if reason is None:
                return checkpoint, skipped
            skipped.append(f"{checkpoint.name}: {reason}")
        return None, skipped

    def publish_checkpoint(self, name: str) -> None:
        """Write the manifest of a checkpoint in `saving` and move it into the run. An incomplete one is replaced."""
        write_manifest(self.saving / name)
        target = self.path / name
        if target.exists():
            self.remove_checkpoint(target)
        (self.saving / name).rename(target)
        self.saving.rmdir()
        flush_to_disk(self.path)

    def remove_checkpoint(self, checkpoint: Path) -> None:
        """Remove a checkpoint. It is renamed first, so that a half-removed one is never taken for complete."""
        doomed = checkpoint.with_name(f"{checkpoint.name}.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)

    def remove_partial(self) -> list[str]:
        """Remove what a killed run left half-written or half-removed. Return the names of the folders."""
        folders = [path for path in self.path.glob("*.partial") if path.name.startswith(("checkpoint", "final."))]
        for folder in folders:
            shutil.rmtree(folder)
        for file in self.path.glob(".*.partial"):
            if file.is_file():  # of write(); an export into this folder is a folder itself
                file.unlink()
        return sorted(folder.name for folder in folders)


def open_run(
    run_dir: RunDirectory, recipe: Recipe, reporter: Reporter, ranks: RankGroup, *, resume: bool, examples_per_step: int
) -> None:
    """Lock the folder from rank 0 and write the recipe into it. A collective: if rank 0 fails, all ranks raise."""
    error: AlignError | None = None
    if ranks.is_main:
        try:
            _open_on_main(run_dir, recipe, reporter, resume=resume, examples_per_step=examples_per_step)
        except AlignError as caught:
            error = caught
    opened = ranks.broadcast(error is None)
    if error is not None:
        raise error
    if not opened:
        raise RunError.at(run_dir.where, "rank 0 could not start the run", fix="read the error of rank 0")
    holder = ranks.broadcast(run_dir.holder())
    is_shared = run_dir.is_held_by(holder)
    if ranks.any(not is_shared):
        what = f"{run_dir.path} is not the folder that rank 0 has locked ({holder})"
        what = "another rank does not see the folder of rank 0" if is_shared else what
        raise RunError.at(run_dir.where, what, fix="name a folder on a disk that all machines share")


def _open_on_main(
    run_dir: RunDirectory, recipe: Recipe, reporter: Reporter, *, resume: bool, examples_per_step: int
) -> None:
    resolved = to_yaml(recipe)
    resumes = run_dir.acquire(resolved, resume=resume, examples_per_step=examples_per_step)
    for name in run_dir.remove_partial():
        reporter.log(f"removed {name}, left by a run that was killed")
    if run_dir.final.exists():
        run_dir.remove_cache()
    elif not resumes:
        run_dir.write("recipe.yaml", recipe.as_given)
        run_dir.write("recipe.resolved.yaml", resolved)
        run_dir.add_facts(environment=environment(), examples_a_step=examples_per_step)


def latest_checkpoint(run_dir: RunDirectory, reporter: Reporter, ranks: RankGroup) -> Path | None:
    """Return the newest complete checkpoint, or None, and cut metrics.jsonl to its step. A collective."""
    checkpoint, skipped = ranks.broadcast(run_dir.newest_checkpoint(hashes=True) if ranks.is_main else None)
    for reason in skipped:
        reporter.log(f"skipped {reason}")
    reporter.log(f"resuming from {checkpoint}" if checkpoint else "no complete checkpoint: starting at step 0")
    if ranks.is_main:
        run_dir.truncate_metrics(_count_logs(checkpoint) if checkpoint else 0)
    return checkpoint


def _count_logs(checkpoint: Path) -> int:
    """Number of logs up to a checkpoint: trainer_state.json has all of them, and metrics.jsonl a line for each."""
    return len(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"])
