"""The life of an export: origin -> weights in a hidden folder -> proof -> one rename."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ernie_align.data.render import renderer_of
from ernie_align.errors import AlignError, ExportError
from ernie_align.exporting.card import card
from ernie_align.exporting.hub import check_push, push_folder
from ernie_align.exporting.merge import Accumulate, digests, merge
from ernie_align.exporting.origin import Origin
from ernie_align.exporting.prompts import Prompts, choose
from ernie_align.exporting.proof import BOUNDS, Bound, Difference, Said, ask, compare, exceeds
from ernie_align.models.load import Bundle, load_model

What = Literal["merged", "adapter"]
PROOF = "export.json"  # beside the weights: what was exported, and what was compared
_VISION_AS_SAVED, _VISION_ON_THE_HUB = "model.vision_model.", "vision_model."


@dataclass(frozen=True)
class Export:
    """A finished export. difference: of what was written from what it was made from."""

    folder: Path
    what: What
    dtype: str
    difference: Difference


def export(
    source: str | Path,
    *,
    to: str | Path,
    what: What = "merged",
    shard_size: str = "5GB",
    accumulate: Accumulate = "float32",
    dtype: str = "auto",
    bound: float | None = None,
    push: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Export:
    """Write a run, an adapter or a model to a new folder, which appears only once it is proved.

    source: a run directory, its `final`, one of its checkpoints, a folder or a hub id; what: merged is the whole model,
    adapter the adapter alone in PEFT's format; shard_size: of the weight files; accumulate: see merge; dtype: of the
    merged weights, `auto` for the base's own; bound: instead of that of proof.BOUNDS; push: hub repository to upload
    the finished folder to; say: told each line of progress.
    Raises ExportError where `to` exists, where what was written says something else than the source beyond the bound,
    or where the upload fails (the folder then stays); ModelError where the adapter does not load whole.
    """
    folder = Path(to)
    if folder.exists() or folder.is_symlink():
        raise ExportError.at(str(folder), "exists already", fix="name a new folder: nothing is overwritten")
    if push is not None:
        check_push(push)
    origin = Origin.find(source)
    made_from = f"{origin.files.name}, an adapter on {origin.base.name}" if origin.is_adapter else origin.files.name
    if what == "adapter" and not origin.is_adapter:
        what_is = f"{origin.files.name} is a model without an adapter"
        raise ExportError.at(str(source), what_is, fix="export it with --what merged")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was cut off
    partial.mkdir(parents=True)
    log(f"exporting {made_from}")
    try:
        made = _Making(origin, partial, what, accumulate, log).make(dtype, shard_size)
        limit = BOUNDS[made.dtype]
        limit = limit if bound is None else replace(limit, value=bound, why="asked for")
        _judge(made, origin, limit, log)
        facts = _facts(made, origin, source, limit)
        (partial / PROOF).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card(origin, facts, name=folder.name), encoding="utf-8")
        _flush(partial)
        if folder.exists():
            raise ExportError.at(str(folder), "was made by somebody else meanwhile", fix="name a new folder")
        partial.rename(folder)
    except AlignError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    log(f"written: {folder}")
    if push is not None:
        log(f"uploaded: {push_folder(folder, push)}")
    return Export(folder, what, made.dtype, made.difference)


@dataclass(frozen=True)
class _Made:
    what: What
    accumulate: Accumulate | None
    dtype: str
    prompts: Prompts
    difference: Difference
    without_adapter: Difference | None
    tensors: int


@dataclass(frozen=True)
class _Making:
    """Model in, files out, model in again: one model is held at a time."""

    origin: Origin
    folder: Path
    what: What
    accumulate: Accumulate
    log: Callable[[str], None]

    def make(self, dtype: str, shard_size: str) -> _Made:
        origin, thinking = self.origin, self.origin.recipe is not None and self.origin.recipe.data.thinking
        bundle = _load(origin.files.name, dtype)
        own_dtype = str(next(bundle.model.parameters()).dtype).removeprefix("torch.")
        prompts = choose(origin.recipe, renderer_of(bundle, thinking=thinking))
        self.log(f"comparing on {prompts}")
        before, without = ask(bundle, prompts.rows, thinking=thinking), None
        if origin.is_adapter:
            with bundle.model.disable_adapter():
                without = compare(before, ask(bundle, prompts.rows, thinking=thinking, continued=False))
        wanted = self._write(bundle, shard_size)
        del bundle
        gc.collect()  # modules and hooks refer to one another, and there may be no room for a second model
        written = _load(str(self.folder), own_dtype)
        if self.what == "merged" and digests(written.model) != wanted:
            fix = "this is a fault of the toolkit, of transformers or of the disk: report it"
            raise ExportError.at(str(self.folder), "the weights read back are not those that were written", fix=fix)
        after: Said = ask(written, prompts.rows, thinking=thinking)
        rounds = self.accumulate if self.what == "merged" and origin.is_adapter else None
        return _Made(self.what, rounds, own_dtype, prompts, compare(before, after), without, len(wanted))

    def _write(self, bundle: Bundle, shard_size: str) -> dict[str, str]:
        """The weights and whatever they need to be loaded. Of merged weights, their digests."""
        if self.what == "adapter":
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(self.origin.files.folder / name, self.folder / name)
            self.origin.files.copy_processor(self.folder)
            return {}
        if self.origin.is_adapter:
            bundle.model = merge(bundle.model, accumulate=self.accumulate)
        bundle.model.save_pretrained(self.folder, max_shard_size=shard_size)
        _name_vision_weights_as_the_hub_does(self.folder)
        bundle.save_processor(str(self.folder))
        return digests(bundle.model)


def _load(name: str, dtype: str) -> Bundle:
    import torch

    bundle = load_model(name, dtype=dtype)
    if torch.cuda.is_available():
        bundle.model.to("cuda")
    return bundle


def _name_vision_weights_as_the_hub_does(folder: Path) -> None:
    """transformers writes `model.vision_model.*` where the published checkpoints have `vision_model.*`."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            if not any(name.startswith(_VISION_AS_SAVED) for name in file.keys()):  # noqa: SIM118 (no mapping)
                continue
            weights = {_hub_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(weights, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text(encoding="utf-8"))
        values["weight_map"] = {_hub_name(name): shard for name, shard in values["weight_map"].items()}
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _hub_name(name: str) -> str:
    return name.replace(_VISION_AS_SAVED, _VISION_ON_THE_HUB, 1) if name.startswith(_VISION_AS_SAVED) else name


def _judge(made: _Made, origin: Origin, bound: Bound, log: Callable[[str], None]) -> None:
    found = made.difference
    if made.tensors:
        log(f"{made.tensors} tensors read back, each bit for bit what was written")
    log(
        f"{_compared(made, origin)}: worst difference of logits {found.worst_difference:.3g} (largest logit "
        f"{found.largest_logit:.3g}), mean KL {found.mean_kl:.3g} nats a token, same likeliest token at "
        f"{100 * found.same_top:.1f} % of {found.positions} positions, same greedy continuation of "
        f"{found.same_texts} of {found.prompts} prompts"
    )
    if made.without_adapter is not None and made.what == "merged":
        log(f"for scale: the adapter itself moves the model by a mean KL of {made.without_adapter.mean_kl:.3g} nats")
    fault = exceeds(found, bound)
    if fault is not None:
        ways = ["keep the adapter apart with --what adapter", "accept it with --bound"]
        if made.dtype == "bfloat16" and made.what == "merged":
            ways.insert(0, "write the weights with --dtype float32 (twice the size, rounded by nothing)")
        raise ExportError.at(str(origin.files.name), fault, why=bound.why, fix=", or ".join(ways))


def _compared(made: _Made, origin: Origin) -> str:
    if made.what == "adapter":
        return "the adapter, read back, against the adapter"
    return "merged against adapter on" if origin.is_adapter else "the model, read back, against the model"


def _facts(made: _Made, origin: Origin, source: str | Path, bound: Bound) -> dict[str, Any]:
    return {
        "source": str(source),
        "base": origin.began_from,
        "what": made.what,
        "dtype": made.dtype,
        "accumulate": made.accumulate,
        "prompts": {"with_images": made.prompts.with_images, **made.prompts.origins},
        "difference": asdict(made.difference),
        "without_adapter": asdict(made.without_adapter) if made.without_adapter else None,
        "bound": asdict(bound),
        "tensors_bit_equal": made.tensors,
        "versions": {name: version(name) for name in ("ernie-align", "transformers", "peft", "torch")},
    }


def _flush(folder: Path) -> None:
    """Onto the disk, before the rename that says it is there."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
