"""Everything of a run before its first step: the recipe, what it trains, its data, and the loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_align.data.load import SourceStats, encode_sample, encode_source, mix_sources
from ernie_align.data.render import Renderer, make_renderer
from ernie_align.data.sources import Source
from ernie_align.dataset_report import DatasetReport, SourceSpec, inspect_sources
from ernie_align.errors import RecipeError
from ernie_align.models.architecture import Architecture
from ernie_align.models.checkpoint_files import CheckpointFiles
from ernie_align.models.distributed.layout import ParallelLayout
from ernie_align.models.load import Bundle, load_model
from ernie_align.models.pixels import ImageSizes
from ernie_align.models.routing import ModalityTokens
from ernie_align.models.trainable_parts import ParameterSummary, adapter_block_from_config, parameter_summary
from ernie_align.recipe import Recipe
from ernie_align.recipe import load_recipe as load_recipe_of
from ernie_align.runs.distributed import rank0_loading_enabled
from ernie_align.stages import STAGES, Datasets, Stage


@dataclass(frozen=True)
class Setup:
    """A recipe that fits its model's config and tokenizer. notes: what was derived from the files of model.name."""

    recipe: Recipe
    stage: Stage
    architecture: Architecture
    parameter_summary: ParameterSummary
    renderer: Renderer
    notes: tuple[str, ...] = ()


def load_recipe(source: Any, *, overrides: Iterable[str] = (), stage: str | None = None) -> Recipe:
    """Load a frozen recipe from a YAML file or a mapping, with `key=value` overrides.

    stage: reject a recipe of any other. Raises RecipeError with all faults, each with its place.
    """
    recipes = {name: known.recipe for name, known in STAGES.items()}
    return load_recipe_of(source, stages=recipes, overrides=overrides, stage=stage)


def set_up(recipe: Recipe) -> Setup:
    """Validate the recipe against its model's config and tokenizer. Raises AlignError if they do not fit."""
    recipe, notes = resolve_adapter_base(recipe)
    block, stage = recipe.model, STAGES[recipe.stage]
    files = CheckpointFiles(block.name, block.revision, block.where("name"))
    if recipe.training.get("eval_strategy", "no") != "no" and not recipe.data.eval:
        raise RecipeError.at(recipe.where("training"), "eval_strategy without rows", fix="name rows under data.eval")
    if recipe.data.streaming and recipe.training.get("max_steps", 0) <= 0:
        fix = "set training.max_steps: the length of a stream is not known"
        raise RecipeError.at(recipe.data.where("streaming"), "streaming without a number of steps", fix=fix)
    config = files.read_json("config.json")
    architecture = Architecture.from_config(config, where=block.where("name"))
    trained = stage.trained_parameters(recipe, architecture)
    modality = ModalityTokens.from_config(config)
    sizes = ImageSizes.from_config(files.image_settings()) if modality else None
    renderer = make_renderer(files.tokenizer(), modality, sizes, thinking=recipe.data.thinking)
    return Setup(recipe, stage, architecture, parameter_summary(architecture, trained), renderer, notes)


def resolve_adapter_base(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """If model.name is a finished run or an adapter, put its base and scope into the recipe.

    Returns the recipe and lines on what was found. Raises RecipeError if the stage trains no adapter, or if
    adapter.path names another one.
    """
    block, notes = recipe.model, []
    where = block.where("name")
    if (Path(block.name) / "run.json").is_file():
        final = Path(block.name) / "final"
        if not final.is_dir():
            raise RecipeError.at(where, f"{block.name} is an unfinished run", fix="finish it with --resume")
        notes.append(f"model.name is a run: using {final}")
        block = block.updated(name=str(final))
        recipe = recipe.updated(model=block)
    files = CheckpointFiles(block.name, block.revision, where)
    if not files.is_adapter:
        return recipe, tuple(notes)
    adapter = getattr(recipe, "adapter", None)
    if "adapter" not in type(recipe).model_fields or getattr(recipe, "tune", None) is not None:
        fix = "name its base, or merge the two with export: this recipe trains the model's own weights"
        raise RecipeError.at(where, f"{block.name} is an adapter, not a model", fix=fix)
    if adapter is not None and adapter.path not in (None, block.name):
        fix = "name the base as model.name, or drop adapter.path"
        raise RecipeError.at(where, f"{block.name} is an adapter, and adapter.path names another", fix=fix)
    config = files.read_json("adapter_config.json")
    base = CheckpointFiles(config.get("base_model_name_or_path") or "", config.get("revision") or "main", where)
    if adapter is None:
        architecture = Architecture.from_config(base.read_json("config.json"), where=where)
        adapter = adapter_block_from_config(config, architecture, where=where)
    notes.append(f"model.name is an adapter: training continues with it, on its base {base.name}")
    block = block.updated(name=base.name, revision=base.revision)
    return recipe.updated(model=block, adapter=adapter.updated(path=files.name)), tuple(notes)


# -- data ---------------------------------------------------------------------------------------------------------


def check_data(
    recipe: Any,
    *,
    workers: int | None = None,
    tick: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> DatasetReport:
    """Read every row of every source of a recipe as training would, without stopping at faulty ones.

    recipe: a Recipe, or what load_recipe takes; workers: processes, default one per core; tick: called with (source,
    rows read, rows).
    Raises AlignError if the recipe does not fit its model.
    """
    setup = set_up(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    data, has_vision = setup.recipe.data, setup.renderer.vision is not None
    return inspect_sources(_source_specs(setup), data, has_vision=has_vision, workers=workers, tick=tick)


def sample_data(setup: Setup, rows: int) -> tuple[list[dict[str, Any]], list[SourceStats]]:
    """Encode the first rows of each source. Returns the training examples, and the row counts of each source.

    Raises DataError if a source or one of those rows is faulty.
    """
    specs, data = _source_specs(setup), setup.recipe.data
    encoded = [encode_sample(Source(spec.block, data, sample=rows), spec.encode) for spec in specs]
    examples = [example for examples, _ in encoded[: len(data.train)] for example in examples]
    return examples, [count for _, count in encoded]


def prepare_data(setup: Setup, *, cache: Path | None = None) -> Datasets:
    """Read, validate and encode the rows of a recipe.

    cache: folder for the encoded rows, which are kept in memory otherwise.
    Raises DataError if a source or a row is faulty.
    """
    recipe = setup.recipe
    seed, data = recipe.run.seed, recipe.data
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    sources: list[Source] = []
    counts: list[SourceStats] = []
    parts: dict[str, list[tuple[Any, Any]]] = {}  # (examples, block) of each source
    for number, spec in enumerate(_source_specs(setup)):
        source = Source(spec.block, data, streaming=data.streaming and spec.part == "train")
        part = parts.setdefault(spec.part, [])
        file = cache / f"{spec.part}-{len(part)}.arrow" if cache is not None else None
        workers = recipe.training.get("dataset_num_proc")
        examples, count = encode_source(source, spec.encode, number=number, cache=file, workers=workers)
        part.append((examples, spec.block))
        sources.append(source)
        counts.append(count)
    mixed = {
        name: mix_sources(*map(list, zip(*part, strict=True)), seed=seed, streaming=data.streaming and name == "train")
        for name, part in parts.items()
    }
    return Datasets(mixed.pop("train"), mixed.pop("eval", None), setup.renderer, sources, counts, mixed)


def _source_specs(setup: Setup) -> list[SourceSpec]:
    """All sources of a recipe: of data.train, of data.eval, then what its stage reads besides."""
    data, encode = setup.recipe.data, setup.stage.encoder(setup.recipe, setup.renderer)
    specs = [SourceSpec(part, block, encode) for part in ("train", "eval") for block in getattr(data, part)]
    for part, extra in setup.stage.extra_sources(setup.recipe, setup.renderer).items():
        specs += [SourceSpec(part, block, extra.encode) for block in extra.sources]
    return specs


# -- model --------------------------------------------------------------------------------------------------------


def load_for_training(setup: Setup, checkpoint: Path | None = None, parallel: ParallelLayout | None = None) -> Bundle:
    """Load the model with its adapter or its unfrozen parameters. checkpoint: of full training, holds the weights."""
    from transformers import set_seed

    block = setup.recipe.model
    holds_model = checkpoint is not None and not (checkpoint / "adapter_config.json").exists()
    bundle = load_model(
        block.name,
        dtype=block.dtype,
        revision=block.revision,
        attention=block.attention,
        where=block.where("name"),
        # Trainer restores a full model with strict=False, and finds 3 of 98 tensors of a VL checkpoint. So the weights
        # are loaded here, and those that Trainer finds are the same.
        weights=str(checkpoint) if holds_model else None,
        parallel=parallel,
        adapters=getattr(setup.recipe, "adapter", None) is not None,
        rank0_loading=rank0_loading_enabled(),
    )
    set_seed(setup.recipe.run.seed)  # a new adapter is initialized at random
    trained = setup.stage.prepare_model(setup.recipe, bundle)
    if parameter_summary(bundle.architecture, trained) != setup.parameter_summary:
        raise AssertionError("the loaded model does not train what the parameter summary shows")
    return bundle
