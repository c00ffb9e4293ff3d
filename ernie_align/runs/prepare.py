"""Everything of a run that can be known and judged before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_align.data.load import Encoder, SourceStats, encode_sample, encode_source, mix_sources
from ernie_align.data.render import Renderer
from ernie_align.data.sources import Source
from ernie_align.dataset_report import DatasetReport, SourceSpec, inspect_sources
from ernie_align.errors import RecipeError
from ernie_align.evaluation.generate import make_renderer
from ernie_align.models.architecture import Architecture
from ernie_align.models.checkpoint_files import CheckpointFiles
from ernie_align.models.pixels import ImageSizes
from ernie_align.models.routing import ModalityTokens
from ernie_align.models.trainable_parts import ParameterSummary, adapter_block_from_config, parameter_summary
from ernie_align.recipe import Recipe, SourceBlock
from ernie_align.recipe import load_recipe as judge_recipe
from ernie_align.stages import STAGES, Datasets, Stage


@dataclass(frozen=True)
class Setup:
    """A recipe, judged against the small files of its model. notes: what was found out about it."""

    recipe: Recipe
    stage: Stage
    architecture: Architecture
    parameter_summary: ParameterSummary
    renderer: Renderer
    notes: tuple[str, ...] = ()


def load_recipe(source: Any, *, overrides: Iterable[str] = (), stage: str | None = None) -> Recipe:
    """A YAML file, or a mapping, and `key=value` overrides -> a frozen recipe.

    stage: refuse a recipe of any other. Raises RecipeError with every fault, each with its place.
    """
    recipes = {name: known.recipe for name, known in STAGES.items()}
    return judge_recipe(source, stages=recipes, overrides=overrides, stage=stage)


def set_up(recipe: Recipe) -> Setup:
    """Judge the recipe against its model's config and tokenizer. Raises AlignError where they do not fit."""
    recipe, notes = resolve_adapter_base(recipe)
    block, stage = recipe.model, STAGES[recipe.stage]
    files = CheckpointFiles(block.name, block.revision, block.where("name"))
    if recipe.training.get("eval_strategy", "no") != "no" and not recipe.data.eval:
        raise RecipeError.at(recipe.where("training"), "eval_strategy without rows", fix="name rows under data.eval")
    if recipe.data.streaming and recipe.training.get("max_steps", 0) <= 0:
        fix = "set training.max_steps: nobody knows how long a stream is"
        raise RecipeError.at(recipe.data.where("streaming"), "streaming without a number of steps", fix=fix)
    config = files.read_json("config.json")
    architecture = Architecture.from_config(config, where=block.where("name"))
    trained = stage.trained_parameters(recipe, architecture)
    modality = ModalityTokens.from_config(config)
    sizes = ImageSizes.from_config(files.image_settings()) if modality else None
    renderer = make_renderer(files.tokenizer(), modality, sizes, thinking=recipe.data.thinking)
    return Setup(recipe, stage, architecture, parameter_summary(architecture, trained), renderer, notes)


def resolve_adapter_base(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Staged alignment: model.name may be a finished run or an adapter, whose base and scope are then found.

    The recipe that this comes to, and what was found. Raises RecipeError where the stage trains no adapter, or where
    adapter.path names another.
    """
    block, notes = recipe.model, []
    where = block.where("name")
    if (Path(block.name) / "run.json").is_file():
        final = Path(block.name) / "final"
        if not final.is_dir():
            raise RecipeError.at(where, f"{block.name} is a run that has not finished", fix="finish it with --resume")
        notes.append(f"model.name is a run: going on from {final}")
        block = block.updated(name=str(final))
        recipe = recipe.updated(model=block)
    files = CheckpointFiles(block.name, block.revision, where)
    if not files.is_adapter:
        return recipe, tuple(notes)
    adapter = getattr(recipe, "adapter", None)
    if "adapter" not in type(recipe).model_fields or getattr(recipe, "tune", None) is not None:
        fix = "name its base, or merge the two: this recipe trains the model's own weights"
        raise RecipeError.at(where, f"{block.name} is an adapter, not a model", fix=fix)
    if adapter is not None and adapter.path not in (None, block.name):
        fix = "name the base as model.name, or drop adapter.path"
        raise RecipeError.at(where, f"{block.name} is an adapter, and adapter.path names another", fix=fix)
    config = files.read_json("adapter_config.json")
    base = CheckpointFiles(config.get("base_model_name_or_path") or "", config.get("revision") or "main", where)
    if adapter is None:
        architecture = Architecture.from_config(base.read_json("config.json"), where=where)
        adapter = adapter_block_from_config(config, architecture, where=where)
    notes.append(f"model.name is an adapter: going on with it, on its base {base.name}")
    block = block.updated(name=base.name, revision=base.revision)
    return recipe.updated(model=block, adapter=adapter.updated(path=files.name)), tuple(notes)


def _asked(setup: Setup) -> list[SourceSpec]:
    """Every source that the recipe names: of train, of eval, then what its stage reads beside."""
    data, encode = setup.recipe.data, setup.stage.encoder(setup.recipe, setup.renderer)
    asked = [SourceSpec(part, block, encode) for part in ("train", "eval") for block in getattr(data, part)]
    for part, extra in setup.stage.extra_sources(setup.recipe, setup.renderer).items():
        asked += [SourceSpec(part, block, extra.encode) for block in extra.sources]
    return asked


def check_data(
    recipe: Any,
    *,
    workers: int | None = None,
    tick: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> DatasetReport:
    """Read every row of every source that the recipe names, as training would, and go on past faulty ones.

    recipe: a Recipe, or what load_recipe takes; workers: processes, otherwise one for each core; tick: told (source,
    rows read, rows).
    Raises AlignError where the recipe does not fit its model.
    """
    setup = set_up(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    data, has_vision = setup.recipe.data, setup.renderer.vision is not None
    return inspect_sources(_asked(setup), data, has_vision=has_vision, workers=workers, tick=tick)


def sample_data(setup: Setup, rows: int) -> tuple[list[dict[str, Any]], list[SourceStats]]:
    """Judge the first rows of each source. The training examples they give, and what became of the rows.

    Raises DataError where a source or one of those rows is unsound.
    """
    asked, data = _asked(setup), setup.recipe.data
    judged = [encode_sample(Source(one.block, data, sample=rows), one.encode) for one in asked]
    examples = [example for given, _ in judged[: len(data.train)] for example in given]
    return examples, [count for _, count in judged]


def prepare_data(setup: Setup, *, cache: Path | None = None) -> Datasets:
    """Read, judge and encode the recipe's rows.

    cache: folder for the encoded rows, which otherwise stay in memory.
    Raises DataError where a source or a row is unsound.
    """
    recipe = setup.recipe
    data, encode = recipe.data, setup.stage.encoder(recipe, setup.renderer)
    workers = recipe.training.get("dataset_num_proc")
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    sources: list[Source] = []
    counts: list[SourceStats] = []

    def read(blocks: list[SourceBlock], kind: str, streaming: bool, encode: Encoder = encode) -> list[Any]:
        prepared = []
        for block in blocks:
            source = Source(block, data, streaming=streaming)
            file = cache / f"{kind}-{len(prepared)}.arrow" if cache is not None else None
            examples, count = encode_source(source, encode, number=len(sources), cache=file, workers=workers)
            sources.append(source)
            counts.append(count)
            prepared.append(examples)
        return prepared

    streaming = data.streaming
    train = mix_sources(read(data.train, "train", streaming), data.train, seed=recipe.run.seed, streaming=streaming)
    held_out = read(data.eval, "eval", False)
    evaluated = mix_sources(held_out, data.eval, seed=recipe.run.seed) if held_out else None
    extra = {
        name: mix_sources(read(wanted.sources, name, False, wanted.encode), wanted.sources, seed=recipe.run.seed)
        for name, wanted in setup.stage.extra_sources(recipe, setup.renderer).items()
    }
    return Datasets(train, evaluated, setup.renderer, sources, counts, extra)
