"""Whether a folder of a run was written to its end and is still what was written: the seal that is put on it last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "complete.json"  # name -> {"size": bytes, "sha256": [of each piece]} of every file

_PIECE = 2**30  # bytes: a file is hashed piece by piece, so that one file of many GB keeps all threads busy
_THREADS = 8
_READ = 2**20  # bytes at a time


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success, flush that file to disk and rename it to `path`.

    A reader sees the old file or the new one, never half of one. Creates the folder. Raises OSError if a write fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    flush_to_disk(partial)
    partial.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8 through `atomic_path`."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def partial_checkpoint(folder: str | Path) -> Path:
    """Where a run's checkpoints are written before they are whole: `checkpoint.partial` in its folder."""
    return Path(folder) / "checkpoint.partial"


def write_manifest(folder: Path) -> None:
    """Say that a folder is whole: sizes and hashes of its files, which are flushed to disk before the seal is.

    Raises OSError where the disk refuses.
    """
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in paths.items() if path.is_file() and name != MANIFEST}
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(flush_to_disk, paths.values()))
        sums = _sums(files.values(), pool)
    sealed = {name: {"size": path.stat().st_size, "sha256": sums[path]} for name, path in files.items()}
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")
    flush_to_disk(partial)
    partial.replace(folder / MANIFEST)
    flush_to_disk(folder)


def integrity_error(folder: Path, *, hashes: bool = False) -> str | None:
    """Why a folder is not whole, or None. hashes: read every file again and compare it with what was written."""
    if not (folder / MANIFEST).exists():
        return "cut off in mid-write"
    try:
        sealed = _manifest(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, (size, _) in sealed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    if hashes:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = _sums([folder / name for name in sealed], pool)
        for name, (_, sums) in sealed.items():
            if sums and found[folder / name] != sums:
                return f"{name} is not what was written: its sha256 differs"
    return None


def manifest_size(folder: Path) -> int:
    """Bytes of a sealed folder's files."""
    return sum(size for size, _ in _manifest(folder).values())


def flush_to_disk(path: Path) -> None:
    """Have a file's content, or a folder's names, on disk: what a machine that loses power has afterwards."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _manifest(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """name -> (size, hashes). Seals of earlier versions hold the size alone."""
    sealed: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {
        name: (entry, []) if isinstance(entry, int) else (entry["size"], entry["sha256"])
        for name, entry in sealed.items()
    }


def _sums(paths: Iterable[Path], pool: ThreadPoolExecutor) -> dict[Path, list[str]]:
    """path -> sha256 of each piece; of a file of one piece it is what sha256sum prints."""
    pieces = {path: range(0, max(path.stat().st_size, 1), _PIECE) for path in paths}
    under_way = {path: [pool.submit(_sum, path, start) for start in starts] for path, starts in pieces.items()}
    return {path: [future.result() for future in futures] for path, futures in under_way.items()}


def _sum(path: Path, start: int) -> str:
    digest, left = hashlib.sha256(), _PIECE
    buffer = memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[: min(left, _READ)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()
