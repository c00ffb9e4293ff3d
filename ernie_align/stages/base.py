"""What a stage is, and how a recipe's `training:` reaches TRL's own config."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ernie_align.errors import RecipeError
from ernie_align.recipe import Recipe, SourceBlock
from ernie_align.recipe.schema import fault

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import Trainer, TrainerCallback

    from ernie_align.data.load import Encoder
    from ernie_align.data.render import Renderer
    from ernie_align.models.architecture import Architecture, ParameterSpec
    from ernie_align.models.load import Bundle
    from ernie_align.models.trainable_parts import Target

# TRL keys that a recipe sets elsewhere, or that would break what this toolkit promises, and where to go instead.
RESERVED_BY_EVERY_STAGE: Mapping[str, str] = {
    "output_dir": "set run.dir",
    "seed": "set run.seed",
    "data_seed": "set run.seed: it orders the data too",
    "model_init_kwargs": "set model.dtype, model.revision or model.attention",
    "trust_remote_code": "drop it: no remote code is ever run",
    "router_aux_loss_coef": "drop it: upstream pools text and vision experts in this loss, so it is kept off",
    "max_length": "set data.max_length",
    "truncation_mode": "set data.overlong",
    "eos_token": "drop it: the checkpoint's chat template ends the turns",
    "pad_token": "drop it: the checkpoint's tokenizer pads",
    "chat_template_path": "drop it: the checkpoint's own chat template is used",
    "remove_unused_columns": "drop it: the collator needs every column",
    "dataset_kwargs": "drop it: rows are prepared before TRL sees them",
    "dataset_text_field": "set data.format",
    "resume_from_checkpoint": "run with --resume",
    "disable_tqdm": "drop it: progress is shown by this toolkit",
    "do_train": "drop it: the stage says what is done",
    "do_eval": "name rows under data.eval",
    "do_predict": "run ernie-align eval",
    "use_cache": "drop it: training never uses a cache",
    "logging_nan_inf_filter": "drop it: a run stops at a loss or gradient that is not finite",
    "hub_token": "drop it: set HF_TOKEN, or run hf auth login",
    "enable_jit_checkpoint": "drop it: a run saves and stops at SIGTERM by itself",
    "hub_model_id": "drop it: push the finished folder, so that nothing half-done is ever published",
    "push_to_hub": "drop it: push the finished folder, so that nothing half-done is ever published",
}


@dataclass(frozen=True)
class ExtraSources:
    """Rows that a stage reads beside data.train and data.eval, and the way from one of them to examples."""

    sources: list[SourceBlock]
    encode: Encoder


def nothing_beside(recipe: Recipe, renderer: Renderer) -> dict[str, ExtraSources]:
    """Of a stage that reads its training and evaluation rows alone."""
    return {}


def one_row_each(recipe: Recipe, lengths: list[int] | None) -> list[str]:
    """Of a stage that pads the rows of a batch, as every trainer does: nothing is to be said."""
    return []


def nothing_to_try(recipe: Recipe, architecture: Architecture, example: dict[str, Any]) -> list[str]:
    """Of a stage of which the coverage, the rows and one example say everything."""
    return []


def nothing_beforehand(recipe: Recipe) -> str:
    """Of a stage that asks the model nothing before it is sharded, and needs no second one."""
    return ""


@dataclass(frozen=True)
class Datasets:
    """What a trainer reads.

    row_name: (source, row) -> the name of the row behind an example; renderer: what the rows were rendered by; beside:
    of Stage.beside, encoded.
    """

    train: Dataset | IterableDataset
    eval: Dataset | IterableDataset | None
    row_name: Callable[[int, int], str]
    renderer: Renderer
    beside: Mapping[str, Dataset] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryProfile:
    """How a stage's training step uses memory; the defaults are those of supervised training.

    sequences_per_row: sequences in a training forward for each row of per_device_train_batch_size (2: both sides of a
    pair); min_sequences: sequences that must stay in one batch; shared_prompt: one sequence holds a prompt and both of
    its answers; reference_forward: the reference model scores every batch, and with reference_in_step it does so while
    the activations of the training forward are held; second_model: the reference is a second copy of the whole model;
    adapter_copies: frozen copies of the trained adapter; completion_length: tokens generated for each prompt;
    generations: completions of each prompt; batches_per_rollout: training batches that one rollout fills.
    """

    sequences_per_row: int = 1
    min_sequences: int = 1
    shared_prompt: bool = False
    reference_forward: bool = False
    reference_in_step: bool = False
    second_model: bool = False
    adapter_copies: int = 0
    completion_length: int = 0
    generations: int = 1
    batches_per_rollout: int = 0


@dataclass(frozen=True)
class Stage:
    """One way to align a model.

    recipe: its recipe class;
    scope: (recipe, anatomy) -> what it trains, from names and shapes alone; raises ModelError where nothing matches;
    wrap: (recipe, bundle) -> the same, done to the loaded model;
    configure: (recipe, output folder) -> TRL's config; raises RecipeError where TRL refuses a value;
    encode: (recipe, renderer) -> the way from a canonical row to examples;
    build_trainer: (recipe, TRL's config, bundle, batches, callbacks) -> a TRL trainer, ready to train;
    beside: (recipe, renderer) -> what else it reads, by name;
    tried: (recipe, anatomy, first example) -> lines about what can be tried without weights;
    layout: (recipe, lengths of the training rows, None for a stream) -> lines about how rows make up batches;
    beforehand: (recipe) -> why each process needs the whole model before FSDP2 shards it; empty where none does.
    """

    name: str
    help: str
    recipe: type[Recipe]
    scope: Callable[[Any, Architecture], list[Target] | list[ParameterSpec]]
    wrap: Callable[[Any, Bundle], list[Target] | list[ParameterSpec]]
    configure: Callable[[Any, str], Any]
    encode: Callable[[Any, Renderer], Encoder]
    build_trainer: Callable[[Any, Any, Bundle, Datasets, list[TrainerCallback]], Trainer]
    beside: Callable[[Any, Renderer], dict[str, ExtraSources]] = nothing_beside
    tried: Callable[[Any, Architecture, dict[str, Any]], list[str]] = nothing_to_try
    layout: Callable[[Any, list[int] | None], list[str]] = one_row_each
    beforehand: Callable[[Any], str] = nothing_beforehand
    memory_profile: Callable[[Any], MemoryProfile] = lambda recipe: MemoryProfile()


def validate_padding(training: Mapping[str, Any], *, flat: bool = False) -> None:
    """Of training.pad_to_multiple_of, which TRL takes as a number, as its text, `auto` or `none`. Raises a fault where
    it is no number to pad to, or, with `flat`, where no row is padded."""
    multiple = training.get("pad_to_multiple_of")
    if not isinstance(multiple, (int, str)) or multiple == "auto" or str(multiple).lower() in ("none", "null"):
        return
    if flat:
        what, why = f"pad_to_multiple_of {multiple} without padding", "rows are laid end to end"
        raise fault("training", what, why=why, fix="drop it, or drop packing and padding_free")
    if not str(multiple).isdecimal() or int(multiple) == 0:
        what = f"pad_to_multiple_of {multiple} is no length"
        raise fault("training", what, fix="set a whole number over 0, or drop it")


def trl_config(cls: type, recipe: Recipe, *, output_dir: str, **owned: Any) -> Any:
    """TRL's config from the recipe's `training:` keys, under what the recipe says elsewhere and the stage does itself.

    save_total_limit is kept back: older checkpoints go once the new one is known to be whole (runs.keep).
    Raises RecipeError where TRL or transformers refuses a value.
    """
    try:
        return cls(
            **{**inherited_defaults(recipe), **recipe.training, "save_total_limit": None, **owned},
            output_dir=output_dir,
            seed=recipe.run.seed,
            data_seed=recipe.run.seed,
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_nan_inf_filter=False,
        )
    except (TypeError, ValueError, ImportError) as error:
        message = str(error).splitlines()[0]
        raise RecipeError.at(recipe.where("training"), f"{cls.__name__} refuses it: {message}") from error


def inherited_defaults(recipe: Recipe) -> dict[str, Any]:
    """Defaults that differ from TRL's because the recipe or the machine already says more. A run shows them first."""
    import torch

    defaults: dict[str, Any] = {
        # TRL's default is bf16 autocast for every model; weights asked for in float32 are computed in float32
        "bf16": recipe.model.dtype == "bfloat16" and not recipe.training.get("fp16"),
        "report_to": ["tensorboard"],
    }
    if not torch.accelerator.is_available():
        defaults["use_cpu"] = True  # transformers refuses bf16 without it
    if "WORLD_SIZE" in os.environ:  # launched
        # every process touches every part (models.touch): a search for unused ones costs time, and finds them falsely
        defaults["ddp_find_unused_parameters"] = False
        if recipe.data.streaming:
            # by default one process reads for all and cuts its batches in even pieces, which images have not
            defaults["accelerator_config"] = {"dispatch_batches": False}
    if recipe.data.eval and "eval_steps" in recipe.training:
        defaults["eval_strategy"] = "steps"
    return {key: value for key, value in defaults.items() if key not in recipe.training}
