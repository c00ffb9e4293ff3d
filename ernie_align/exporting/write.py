"""Write an export: load the source, save its weights to a hidden folder, check them, rename the folder."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ernie_align.checkpoints import flush_to_disk
from ernie_align.data.render import renderer_of
from ernie_align.errors import AlignError, ExportError
from ernie_align.exporting.parity import BOUNDS, Bound, Difference, Prompts, choose_prompts, compare, run_prompts
from ernie_align.exporting.source import ExportSource
from ernie_align.models.load import Bundle, load_model

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

What = Literal["merged", "adapter"]
Accumulate = Literal["float32", "native"]
EXPORT_FILE = "export.json"  # next to the weights: what was exported, and the result of the comparison
_VISION_AS_SAVED, _VISION_ON_THE_HUB = "model.vision_model.", "vision_model."
_PIPELINES = {"vl_moe": "image-text-to-text", "moe": "text-generation", "dense": "text-generation"}
_TIMING_METRICS = ("runtime", "per_second", "epoch", "num_tokens")


@dataclass(frozen=True)
class Export:
    """A finished export. difference: between what was written and its source."""

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
    """Write a run, an adapter or a model to a new folder, which appears only after the written model is checked.

    source: a run directory, its `final`, one of its checkpoints, a folder or a hub id; what: `merged` writes the whole
    model, `adapter` only the adapter in PEFT's format; shard_size: of the weight files; accumulate: see merge; dtype:
    of the merged weights, `auto` for the base's own; bound: replaces the value in parity.BOUNDS; push: hub repository
    to upload the finished folder to; log: called with each line of progress.
    Raises ExportError if `to` exists, if the written model differs from the source by more than the bound, or if the
    upload fails (the folder then stays); ModelError if the adapter does not load completely.
    """
    folder = Path(to)
    if folder.exists() or folder.is_symlink():
        raise ExportError.at(str(folder), "already exists", fix="name a new folder: nothing is overwritten")
    if push is not None:
        _check_push(push)
    origin = ExportSource.find(source)
    base = f", an adapter on {origin.base.name}" if origin.is_adapter else ""
    if what == "adapter" and not origin.is_adapter:
        no_adapter = f"{origin.files.name} is a model without an adapter"
        raise ExportError.at(str(source), no_adapter, fix="export it with --what merged")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was interrupted
    partial.mkdir(parents=True)
    log(f"exporting {origin.files.name}{base}")
    try:
        result = _write_and_compare(origin, partial, what, accumulate, dtype, shard_size, log)
        limit = BOUNDS[result.dtype]
        limit = limit if bound is None else replace(limit, value=bound, why="set by --bound")
        _check_difference(result, origin, limit, log)
        facts = _facts(result, origin, source, limit)
        (partial / EXPORT_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_render_card(origin, facts, name=folder.name), encoding="utf-8")
        _flush(partial)
        if folder.exists():
            raise ExportError.at(str(folder), "was created by another process meanwhile", fix="name a new folder")
        partial.rename(folder)
    except AlignError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    log(f"written: {folder}")
    if push is not None:
        log(f"uploaded: {_push_folder(folder, push)}")
    return Export(folder, what, result.dtype, result.difference)


@dataclass(frozen=True)
class _Result:
    what: What
    accumulate: Accumulate | None
    dtype: str
    prompts: Prompts
    difference: Difference
    without_adapter: Difference | None
    tensors: int


def _write_and_compare(
    source: ExportSource,
    folder: Path,
    what: What,
    accumulate: Accumulate,
    dtype: str,
    shard_size: str,
    log: Callable[[str], None],
) -> _Result:
    """Load the source, write it, load the result and compare; only one model is in memory at a time."""
    thinking = source.recipe is not None and source.recipe.data.thinking
    bundle = _load(source.files.name, dtype)
    dtype = str(next(bundle.model.parameters()).dtype).removeprefix("torch.")
    prompts = choose_prompts(source.recipe, renderer_of(bundle, thinking=thinking))
    log(f"comparing on {prompts}")
    before, without = run_prompts(bundle, prompts.rows, thinking=thinking), None
    if source.is_adapter:
        with bundle.model.disable_adapter():
            without = compare(before, run_prompts(bundle, prompts.rows, thinking=thinking, generate=False))
    digests = _write_weights(source, bundle, folder, what, accumulate, shard_size)
    del bundle
    gc.collect()  # modules and hooks refer to one another, and memory may not hold a second model
    written = _load(str(folder), dtype)
    if what == "merged" and weight_digests(written.model) != digests:
        fix = "this is a bug in ernie-align or transformers, or a disk failure: report it"
        raise ExportError.at(str(folder), "the weights read back differ from those that were written", fix=fix)
    difference = compare(before, run_prompts(written, prompts.rows, thinking=thinking))
    accumulated = accumulate if what == "merged" and source.is_adapter else None
    return _Result(what, accumulated, dtype, prompts, difference, without, len(digests))


def _load(name: str, dtype: str) -> Bundle:
    import torch

    bundle = load_model(name, dtype=dtype)
    if torch.cuda.is_available():
        bundle.model.to("cuda")
    return bundle


def _write_weights(
    source: ExportSource, bundle: Bundle, folder: Path, what: What, accumulate: Accumulate, shard_size: str
) -> dict[str, str]:
    """Write the weights and the files needed to load them. Return the digests of merged weights."""
    if what == "adapter":
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(source.files.folder / name, folder / name)
        source.files.copy_processor(folder)
        return {}
    if source.is_adapter:
        bundle.model = merge(bundle.model, accumulate=accumulate)
    bundle.model.save_pretrained(folder, max_shard_size=shard_size)
    _rename_vision_weights(folder)
    bundle.save_processor(str(folder))
    return weight_digests(bundle.model)


def merge(model: PeftModel, *, accumulate: Accumulate = "float32") -> PreTrainedModel:
    """Add the adapter to its weights, W <- W + scaling · B·A, and return the base model without adapter layers.

    accumulate: `float32` computes product and sum in float32 and rounds once to W's dtype; `native` is PEFT's own way,
    which rounds the product for experts, routers and other bare parameters before adding it.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
            dtype = weight.dtype
            if accumulate == "float32":
                weight.data = weight.data.float()
            module.merge()
            weight.data = weight.data.to(dtype)
    return model.unload()


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of dtype, shape and bits of each parameter, by name."""
    import torch

    digests = {}
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()
    return digests


def _rename_vision_weights(folder: Path) -> None:
    """Rename `model.vision_model.*`, as transformers saves it, to the published checkpoints' `vision_model.*`."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            if not any(name.startswith(_VISION_AS_SAVED) for name in file.keys()):  # noqa: SIM118 (not a mapping)
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


def _check_difference(result: _Result, source: ExportSource, bound: Bound, log: Callable[[str], None]) -> None:
    difference = result.difference
    if result.tensors:
        log(f"{result.tensors} tensors read back, each bit-identical to what was written")
    if result.what == "adapter":
        compared = "written adapter against the source adapter"
    else:
        compared = "merged model against base and adapter" if source.is_adapter else "written model against the source"
    log(
        f"{compared}: worst difference of logits {difference.worst_difference:.3g} (largest logit "
        f"{difference.largest_logit:.3g}), mean KL {difference.mean_kl:.3g} nats per token, same most likely token at "
        f"{100 * difference.same_top:.1f} % of {difference.positions} positions, same greedy continuation of "
        f"{difference.same_texts} of {difference.prompts} prompts"
    )
    if result.without_adapter is not None and result.what == "merged":
        kl = result.without_adapter.mean_kl
        log(f"for comparison: the adapter itself changes the model by a mean KL of {kl:.3g} nats")
    violation = bound.violation(difference)
    if violation is not None:
        fixes = ["export the adapter alone with --what adapter", "accept the difference with --bound"]
        if result.dtype == "bfloat16" and result.what == "merged":
            fixes.insert(0, "write the weights with --dtype float32 (twice the size, no rounding)")
        raise ExportError.at(str(source.files.name), violation, why=bound.why, fix=", or ".join(fixes))


def _facts(result: _Result, source: ExportSource, name: str | Path, bound: Bound) -> dict[str, Any]:
    return {
        "source": str(name),
        "base": source.initial_model,
        "what": result.what,
        "dtype": result.dtype,
        "accumulate": result.accumulate,
        "prompts": {"with_images": result.prompts.with_images, **result.prompts.origins},
        "difference": asdict(result.difference),
        "without_adapter": asdict(result.without_adapter) if result.without_adapter else None,
        "bound": {"of": bound.metric, "label": bound.label, "value": bound.value, "why": bound.why},
        "tensors_bit_equal": result.tensors,
        "versions": {package: version(package) for package in ("ernie-align", "transformers", "peft", "torch")},
    }


def _render_card(source: ExportSource, facts: dict[str, Any], *, name: str) -> str:
    """Render the model card as Markdown. facts: of export.json; name: of the folder."""
    from jinja2 import Environment, StrictUndefined

    from ernie_align.models.architecture import model_family

    template = files("ernie_align.exporting").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    run = source.run_file("run.json") or {}
    recipe = source.run / "recipe.resolved.yaml" if source.run is not None else None
    family = model_family(source.base.read_json("config.json"), where=source.base.name)
    base = facts["base"]
    return environment.from_string(template).render(
        name=name,
        facts=facts,
        base=base,
        base_on_hub=base if base is not None and "/" in base and not Path(base).exists() else None,
        has_vision=family == "vl_moe",
        pipeline=_PIPELINES[family],
        stage=source.recipe.stage if source.recipe is not None else None,
        recipe=recipe.read_text(encoding="utf-8").strip() if recipe is not None and recipe.is_file() else None,
        parameter_summary=[row for row in source.run_file("coverage.json") or [] if row["trained_tensors"]],
        sources=source.run_file("data.json") or [],
        metrics={
            key: value
            for key, value in (run.get("metrics") or {}).items()
            if source.is_final and isinstance(value, (int, float)) and not key.endswith(_TIMING_METRICS)
        },
        environment=run.get("environment") or {},
    )


def _flush(folder: Path) -> None:
    """Flush all files to disk before the rename that makes them visible."""
    for path in folder.rglob("*"):
        flush_to_disk(path)


def _check_push(name: str) -> None:
    """Raise ExportError if an upload cannot start, before anything is merged."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ExportError.at("--push", f"invalid repository name {name!r}", fix="write owner/name")
    if get_token() is None:
        raise ExportError.at("--push", "you are not logged in to the hub", fix="run hf auth login, or set HF_TOKEN")


def _push_folder(folder: Path, name: str) -> str:
    """Upload the folder to the repository, which is created as private if it does not exist. Return its address.

    Raises ExportError; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Exported by ernie-align")
    except Exception as error:  # network, permissions, quota: each has its own class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = f"the export is complete; retry the upload with hf upload {name} {folder}"
        raise ExportError.at("--push", f"{folder} was not uploaded: {reason}", fix=fix) from error
    return str(address)
