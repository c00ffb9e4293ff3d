"""Tell a complete checkpoint from an incomplete one, and write files atomically.

A manifest is written into a checkpoint last: without one, the write was interrupted.
"""

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
_READ = 2**20  # bytes per read


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
    """Return `checkpoint.partial` in a run's folder: checkpoints are written there and renamed once complete."""
    return Path(folder) / "checkpoint.partial"


def write_manifest(folder: Path) -> None:
    """Mark a checkpoint complete: flush its files to disk, then write their sizes and hashes into its manifest.

    Raises OSError if a write fails.
    """
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in paths.items() if path.is_file() and name != MANIFEST}
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(flush_to_disk, paths.values()))
        hashes = _hash_files(files.values(), pool)
    manifest = {name: {"size": path.stat().st_size, "sha256": hashes[path]} for name, path in files.items()}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    flush_to_disk(folder)


def integrity_error(folder: Path, *, hashes: bool = False) -> str | None:
    """Return why a checkpoint is incomplete or changed, or None. hashes: read every file again and compare hashes."""
    if not (folder / MANIFEST).exists():
        return "its write was interrupted"
    try:
        manifest = _read_manifest(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, (size, _) in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if hashes:
        with ThreadPoolExecutor(_THREADS) as pool:
            current = _hash_files([folder / name for name in manifest], pool)
        for name, (_, written) in manifest.items():
            if written and current[folder / name] != written:
                return f"{name} changed since it was written: its sha256 differs"
    return None


def manifest_size(folder: Path) -> int:
    """Return the bytes of all files in a complete checkpoint."""
    return sum(size for size, _ in _read_manifest(folder).values())


def flush_to_disk(path: Path) -> None:
    """Fsync a file's content, or a folder's entries, so that it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_manifest(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """Return name -> (size, hashes). Manifests of earlier versions hold the size only."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {
        name: (entry, []) if isinstance(entry, int) else (entry["size"], entry["sha256"])
        for name, entry in manifest.items()
    }


def _hash_files(paths: Iterable[Path], pool: ThreadPoolExecutor) -> dict[Path, list[str]]:
    """Return path -> sha256 of each piece; for a file of one piece it equals the output of sha256sum."""
    pieces = {path: range(0, max(path.stat().st_size, 1), _PIECE) for path in paths}
    futures = {path: [pool.submit(_hash_piece, path, start) for start in starts] for path, starts in pieces.items()}
    return {path: [future.result() for future in of_file] for path, of_file in futures.items()}


def _hash_piece(path: Path, start: int) -> str:
    digest, left = hashlib.sha256(), _PIECE
    buffer = memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[: min(left, _READ)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()
