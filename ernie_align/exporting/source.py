"""Find the model or adapter to export, and the run that made it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ernie_align.checkpoints import integrity_error
from ernie_align.errors import AlignError, ExportError
from ernie_align.models.checkpoint_files import CheckpointFiles
from ernie_align.recipe import Recipe, load_recipe
from ernie_align.stages import STAGES


@dataclass(frozen=True)
class ExportSource:
    """The input of an export. files: of the model or adapter; run: the run directory that contains it, or None."""

    files: CheckpointFiles
    run: Path | None

    @classmethod
    def find(cls, name: str | Path) -> ExportSource:
        """Find a source by name: a run directory, its `final`, one of its checkpoints, a folder or a hub id.

        Raises ExportError for an unfinished run and for an incomplete checkpoint.
        """
        path = Path(name)
        if (path / "run.json").is_file():
            if not (path / "final").is_dir():
                complete = [str(folder) for folder in sorted(path.glob("checkpoint-*")) if not integrity_error(folder)]
                fix = f"name a checkpoint: {', '.join(complete)}" if complete else "finish the run with --resume"
                raise ExportError.at(str(name), "the run has not finished", fix=fix)
            return cls(CheckpointFiles(str(path / "final")), path)
        run = path.parent if (path.parent / "run.json").is_file() else None
        if run is not None and path.name.startswith("checkpoint-"):
            reason = integrity_error(path)
            if reason is not None:
                raise ExportError.at(str(name), f"incomplete checkpoint: {reason}", fix="name an older checkpoint")
        return cls(CheckpointFiles(str(name)), run)

    @property
    def is_final(self) -> bool:
        """True for the end of a run, whose last evaluation belongs to these weights."""
        return self.run is not None and Path(self.files.name) == self.run / "final"

    @cached_property
    def is_adapter(self) -> bool:
        """True for an adapter, False for a model. Raises ModelError if it is neither."""
        if self.files.is_adapter:
            return True
        self.files.read_json("config.json")
        return False

    @cached_property
    def base(self) -> CheckpointFiles:
        """The base model of an adapter; a model is its own base."""
        if not self.is_adapter:
            return self.files
        config = self.files.read_json("adapter_config.json")
        return CheckpointFiles(config.get("base_model_name_or_path") or "", config.get("revision") or "main")

    @cached_property
    def initial_model(self) -> str | None:
        """The model that training started from: an adapter's base, or the one that the run's recipe names."""
        if self.is_adapter:
            return self.base.name
        return self.recipe.model.name if self.recipe is not None else None

    @cached_property
    def recipe(self) -> Recipe | None:
        """The run's resolved recipe; None without a run, or if this version cannot read it."""
        path = self.run / "recipe.resolved.yaml" if self.run is not None else None
        if path is None or not path.is_file():
            return None
        try:
            return load_recipe(path, stages={name: stage.recipe for name, stage in STAGES.items()})
        except AlignError:
            return None

    def run_file(self, name: str) -> Any:
        """Read a JSON file of the run; None if it does not exist."""
        path = self.run / name if self.run is not None else None
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None
