"""A policy and its reference: what dpo and upo train, and the model that it is held to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from ernie_align.errors import RecipeError, RunError
from ernie_align.models.adapters import attach_adapter, unfreeze
from ernie_align.models.trainable_parts import adapter_targets, tuned_parameters
from ernie_align.recipe import AdapterBlock, Recipe, TuneBlock
from ernie_align.recipe.schema import fault

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from ernie_align.models.architecture import Architecture, ParameterSpec
    from ernie_align.models.load import Bundle
    from ernie_align.models.trainable_parts import Target


class PolicyRecipe(Recipe):
    """Training of adapters (`adapter:`), or of the parts in `tune.scopes`."""

    adapter: AdapterBlock | None = None
    tune: TuneBlock | None = None

    @model_validator(mode="after")
    def _one_way_to_train(self) -> PolicyRecipe:
        if self.adapter is not None and self.tune is not None:
            raise fault("tune", "both adapter and tune", fix="train adapters, or weights: keep one of the two")
        return self

    @property
    def continues_adapter(self) -> bool:
        """The policy goes on with an adapter, whose first state is the reference."""
        return self.adapter is not None and self.adapter.path is not None


def scope(recipe: PolicyRecipe, architecture: Architecture) -> list[Target] | list[ParameterSpec]:
    """See Stage."""
    return _trained(
        recipe, lambda block: adapter_targets(architecture, block), lambda block: tuned_parameters(architecture, block)
    )


def wrap(recipe: PolicyRecipe, bundle: Bundle) -> list[Target] | list[ParameterSpec]:
    """See Stage."""
    return _trained(recipe, lambda block: attach_adapter(bundle, block), lambda block: unfreeze(bundle, block))


def _trained(
    recipe: PolicyRecipe, by_adapter: Callable[[AdapterBlock], Any], by_tune: Callable[[TuneBlock], Any]
) -> Any:
    if recipe.adapter is not None:
        return by_adapter(recipe.adapter)
    if recipe.tune is not None:
        return by_tune(recipe.tune)
    fix = "write adapter: {scopes: [...]} or tune: {scopes: all}, or name an adapter to go on with as model.name"
    raise RecipeError.at(recipe.where("adapter"), "nothing says what is trained", fix=fix)


def load_reference_model(recipe: PolicyRecipe, bundle: Bundle) -> nn.Module:
    """The recipe's model once more, routed and shared out like the policy. Of a resumed run too, it is where the run
    began."""
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
    """Where the reference's log-probabilities of whole data sets are kept, each asked once.

    depends_on: what they depend on beside the reference's weights and the rows.
    """
    from ernie_align.stages.reference import ReferenceLogps

    fingerprint = bundle.files.fingerprint(recipe.adapter.path if recipe.continues_adapter else None)
    # a policy that goes on from a checkpoint of full fine-tuning is no longer its own reference
    is_reference = recipe.adapter is not None or bundle.weights is None
    model = f"{fingerprint} {recipe.model.dtype} {depends_on}"
    return ReferenceLogps(run_dir / "reference", model, can_compute=is_reference)


_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "media")


class ReferenceLogps:
    """Files `<name>.safetensors` under a folder, each with the fingerprint of what it was computed from.

    model: fingerprint of the reference's weights, and of whatever else the log-probabilities depend on; can_compute:
    the reference is at hand.
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
        """The data set with columns ref_chosen_logps and ref_rejected_logps.

        reference: batch of the collator -> (P,) chosen, (P,) rejected; asked only where nothing fitting is kept.
        Raises RunError where nothing is kept and the reference is not at hand.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        path = self.folder / f"{name}.safetensors"
        fingerprint = self._fingerprint(dataset)
        kept = _read(path, fingerprint)
        if not all(gather_object([kept is not None])):  # one asks with all or none does: they may share its weights
            kept = None
        if kept is None and not self.can_compute:
            what = "holds no log-probabilities of this model on these rows and images"
            raise RunError.at(str(path), what, fix="restore the file, the rows or the images, or begin anew")
        if kept is None:
            kept = self._compute(dataset, reference, batch_size, collate)
            if PartialState().is_main_process:
                _write(path, kept, fingerprint)
            PartialState().wait_for_everyone()
        for column, values in kept.items():
            dataset = dataset.add_column(column, values.tolist())
        return dataset

    def _compute(self, dataset: Dataset, reference: Any, batch_size: int, collate: Any) -> dict[str, Tensor]:
        """Each process asks about its share of the batches, and about the last one again where it has one fewer."""
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState()
        starts = range(0, len(dataset), batch_size)
        found = []
        rounds = -(-len(starts) // state.num_processes)
        for number in range(state.process_index, rounds * state.num_processes, state.num_processes):
            start = starts[min(number, len(starts) - 1)]
            rows = [dataset[place] for place in range(start, min(start + batch_size, len(dataset)))]
            found.append((number, *(side.float().cpu() for side in reference(collate(rows)))))
        in_order = sorted(gather_object(found), key=lambda batch: batch[0])[: len(starts)]
        _, chosen, rejected = zip(*in_order, strict=True)
        return {"ref_chosen_logps": torch.cat(chosen), "ref_rejected_logps": torch.cat(rejected)}

    def _fingerprint(self, dataset: Dataset) -> str:
        """Of the model, the tokens and the images: bytes as they are, files by path, size and time of change."""
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
    except SafetensorError:  # cut off in mid-write by an older run
        return None


def _write(path: Path, values: dict[str, Tensor], fingerprint: str) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(values, partial, metadata={"fingerprint": fingerprint})
    partial.replace(path)
