"""The reference of preference training: what the policy is compared to, and its log-probabilities computed in advance.

It is the model that training starts from, in every mode: adapters off behind a fresh adapter, a frozen copy of an
adapter that training continues (models.adapters.add_reference_adapter), a second model for full fine-tuning, or
log-probabilities computed once and kept in the run directory. AlignmentTrainer.use_reference switches to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from ernie_align.checkpoints import atomic_path
from ernie_align.errors import RunError
from ernie_align.recipe import AdapterBlock, Recipe, TuneBlock
from ernie_align.recipe.schema import fault

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from ernie_align.models.load import Bundle

# Keys that TRL's trainers with a reference share -> why a recipe may not set them.
REFERENCE_STAYS = {
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        "drop it: the reference stays the model that the run started from",
    ),
    # transformers reloads the best weights with strict=False, which matches 3 of 98 tensors of a VL model
    "load_best_model_at_end": "drop it: keep the checkpoints and choose one with ernie-align eval",
}

_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "media")


class PolicyRecipe(Recipe):
    """Training of adapters (`adapter:`), or of the parts in `tune.scopes`, against a reference."""

    adapter: AdapterBlock | None = None
    tune: TuneBlock | None = None

    @model_validator(mode="after")
    def _adapter_or_tune(self) -> PolicyRecipe:
        if self.adapter is not None and self.tune is not None:
            raise fault("tune", "both adapter and tune", fix="train adapters, or weights: keep one of the two")
        return self

    @property
    def continues_adapter(self) -> bool:
        """The policy continues from an existing adapter, whose first state is the reference."""
        return self.adapter is not None and self.adapter.path is not None


def load_reference_model(recipe: PolicyRecipe, bundle: Bundle) -> nn.Module:
    """Load the recipe's model a second time, frozen, routed and sharded like the policy.

    A resumed run loads it from model.name too, so the reference stays where the run began.
    """
    from ernie_align.models.load import load_model

    block = recipe.model
    reference = load_model(
        block.name,
        dtype=block.dtype,
        revision=block.revision,
        attention=block.attention,
        where=block.where("name"),
        parallel=bundle.parallel,
    )
    return reference.model.requires_grad_(False)


def precomputed_reference(recipe: PolicyRecipe, bundle: Bundle, run_dir: Path, *, depends_on: str) -> ReferenceLogps:
    """Return the store of the reference's log-probabilities of whole data sets, in the run directory.

    depends_on: settings that change them, besides the reference's weights and the rows.
    """
    fingerprint = bundle.files.fingerprint(recipe.adapter.path if recipe.continues_adapter else None)
    # a policy resumed from a checkpoint of full fine-tuning is no longer its own reference
    is_reference = recipe.adapter is not None or bundle.weights is None
    model = f"{fingerprint} {recipe.model.dtype} {depends_on}"
    return ReferenceLogps(run_dir / "reference", model, can_compute=is_reference)


class ReferenceLogps:
    """Reference log-probabilities in files `<name>.safetensors`, each with the fingerprint of what it depends on.

    model: fingerprint of the reference's weights and of the settings that change log-probabilities; can_compute: the
    reference is available.
    """

    def __init__(self, folder: Path, model: str, *, can_compute: bool = True):
        self.folder = folder
        self.model = model
        self.can_compute = can_compute

    def add_to(
        self,
        dataset: Dataset,
        name: str,
        reference: Callable[[dict[str, Any]], tuple[Tensor, Tensor]],
        batch_size: int,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    ) -> Dataset:
        """Return the data set with columns ref_chosen_logps and ref_rejected_logps.

        reference: batch of the collator -> (P,) chosen, (P,) rejected; called only if no file matches.
        Raises RunError if no file matches and the reference is not available.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object
        from safetensors.torch import save_file

        path = self.folder / f"{name}.safetensors"
        fingerprint = self._fingerprint(dataset)
        columns = _read(path, fingerprint)
        if not all(gather_object([columns is not None])):  # all ranks compute or none: they may share its weights
            columns = None
        if columns is None and not self.can_compute:
            what = "holds no log-probabilities of this model on these rows and images"
            fix = "restore the file, the rows or the images, or start again in another run.dir"
            raise RunError.at(str(path), what, fix=fix)
        if columns is None:
            columns = self._compute(dataset, reference, batch_size, collate)
            if PartialState().is_main_process:
                with atomic_path(path) as partial:
                    save_file(columns, partial, metadata={"fingerprint": fingerprint})
            PartialState().wait_for_everyone()
        for column, values in columns.items():
            dataset = dataset.add_column(column, values.tolist())
        return dataset

    def _compute(self, dataset: Dataset, reference: Any, batch_size: int, collate: Any) -> dict[str, Tensor]:
        """Split the batches over the ranks; a rank with one batch fewer repeats the last one, for the collectives."""
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState()
        starts = range(0, len(dataset), batch_size)
        batches = []
        rounds = -(-len(starts) // state.num_processes)
        for number in range(state.process_index, rounds * state.num_processes, state.num_processes):
            start = starts[min(number, len(starts) - 1)]
            rows = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            batches.append((number, *(side.float().cpu() for side in reference(collate(rows)))))
        in_order = sorted(gather_object(batches), key=lambda batch: batch[0])[: len(starts)]
        _, chosen, rejected = zip(*in_order, strict=True)
        return {"ref_chosen_logps": torch.cat(chosen), "ref_rejected_logps": torch.cat(rejected)}

    def _fingerprint(self, dataset: Dataset) -> str:
        """Hash the model, the tokens and the images: embedded images by content, files by path, size and mtime."""
        digest = hashlib.sha256(self.model.encode())
        for row in dataset.select_columns(list(_COLUMNS)):
            for image in row["media"]:
                if image["path"] is not None and image["bytes"] is None:
                    status = Path(image["path"]).stat()
                    image["bytes"] = f"{status.st_size} {status.st_mtime_ns}".encode()
                digest.update(str(image["path"]).encode() + b"\0" + image["bytes"])
            digest.update(json.dumps([row[column] for column in _COLUMNS[:-1]]).encode())
        return digest.hexdigest()


def _read(path: Path, fingerprint: str) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata().get("fingerprint") != fingerprint:
                return None
            return {name: file.get_tensor(name) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    except SafetensorError:  # written only in part
        return None
