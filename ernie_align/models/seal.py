"""Whether a checkpoint of a run was written to its end: the seal that is put on it last."""

from __future__ import annotations

import json
import os
from pathlib import Path

SEAL = "complete.json"  # written last into a checkpoint: name and size of each of its files


def seal(checkpoint: Path) -> None:
    """Say that a checkpoint is whole: the names and sizes of its files, flushed to disk before the seal is."""
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    partial = checkpoint / f".{SEAL}.partial"
    partial.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(checkpoint / SEAL)


def broken(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    path = checkpoint / SEAL
    if not path.exists():
        return "cut off in mid-write"
    for name, size in json.loads(path.read_text(encoding="utf-8")).items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None
