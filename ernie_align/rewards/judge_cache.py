"""A judge's verdicts on disk: what was paid for once is not asked again."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

_PATIENCE = 60.0  # seconds to wait for another process that writes


def key_of(url: str, request: Mapping[str, Any]) -> str:
    """What a verdict is kept under: the endpoint and everything it was asked with, the model's name included."""
    text = json.dumps([url, request], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Verdicts:
    """key -> score, in one SQLite file that several processes may share; without a folder, in memory.

    A connection is opened for each batch: one of SQLite's must cross neither threads nor a fork.
    """

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / "judge.sqlite"
        self._memory: dict[str, float] = {}

    def __len__(self) -> int:
        if self.path is None:
            return len(self._memory)
        with closing(self._open()) as file:
            return file.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0]

    def get(self, keys: list[str]) -> dict[str, float]:
        """The verdicts there are."""
        if self.path is None:
            return {key: self._memory[key] for key in keys if key in self._memory}
        with closing(self._open()) as file:
            rows = (file.execute("SELECT key, score FROM verdicts WHERE key = ?", (key,)).fetchone() for key in keys)
            return dict(row for row in rows if row)

    def keep(self, key: str, score: float, reply: str) -> None:
        """Written at once: whatever becomes of the next one, this one is not lost. reply: for who reads the file."""
        if self.path is None:
            self._memory[key] = score
            return
        with closing(self._open()) as file, file:
            file.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (key, score, reply))

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = sqlite3.connect(self.path, timeout=_PATIENCE)
        file.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL, reply TEXT)")
        return file
