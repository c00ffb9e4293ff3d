"""What is exported: a model or an adapter, and the run that made it, if one did."""

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
class Origin:
    """files: the model or adapter itself; run: the run directory it stands in."""

    files: CheckpointFiles
    run: Path | None

    @classmethod
    def find(cls, source: str | Path) -> Origin:
        """source: a run directory, its `final`, one of its checkpoints, a folder or a hub id.

        Raises ExportError for an unfinished run and for a checkpoint that was cut off.
        """
        path = Path(source)
        if (path / "run.json").is_file():
            if not (path / "final").is_dir():
                whole = [str(found) for found in sorted(path.glob("checkpoint-*")) if integrity_error(found) is None]
                fix = f"name a checkpoint: {', '.join(whole)}" if whole else "finish it with --resume"
                raise ExportError.at(str(source), "a run that has not finished", fix=fix)
            return cls(CheckpointFiles(str(path / "final")), path)
        run = path.parent if (path.parent / "run.json").is_file() else None
        if run is not None and path.name.startswith("checkpoint-"):
            reason = integrity_error(path)
            if reason is not None:
                raise ExportError.at(str(source), f"not a whole checkpoint: {reason}", fix="name an older one")
        return cls(CheckpointFiles(str(source)), run)

    @property
    def is_final(self) -> bool:
        """The end of its run, whose last evaluation is of these weights."""
        return self.run is not None and Path(self.files.name) == self.run / "final"

    @cached_property
    def is_adapter(self) -> bool:
        """An adapter, and not a model of its own. Raises ModelError where it is neither."""
        if self.files.is_adapter:
            return True
        self.files.read_json("config.json")
        return False

    @cached_property
    def base(self) -> CheckpointFiles:
        """The model that an adapter sits on; a model is its own base."""
        if not self.is_adapter:
            return self.files
        config = self.files.read_json("adapter_config.json")
        return CheckpointFiles(config.get("base_model_name_or_path") or "", config.get("revision") or "main")

    @cached_property
    def began_from(self) -> str | None:
        """What the weights were before: an adapter's base, or the model that the run was given."""
        if self.is_adapter:
            return self.base.name
        return self.recipe.model.name if self.recipe is not None else None

    @cached_property
    def recipe(self) -> Recipe | None:
        """Of the run, as it was resolved; None without a run, or where this version no longer understands it."""
        path = self.run / "recipe.resolved.yaml" if self.run is not None else None
        if path is None or not path.is_file():
            return None
        try:
            return load_recipe(path, stages={name: stage.recipe for name, stage in STAGES.items()})
        except AlignError:
            return None

    def run_file(self, name: str) -> Any:
        """A JSON file of the run, or None."""
        path = self.run / name if self.run is not None else None
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None
