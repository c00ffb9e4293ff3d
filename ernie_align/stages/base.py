"""The interface of a stage, and how a recipe's `training:` keys reach TRL's own config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ernie_align.errors import RecipeError
from ernie_align.models.adapters import attach_adapter, unfreeze
from ernie_align.models.trainable_parts import adapter_targets, tuned_parameters
from ernie_align.recipe import AdapterBlock, Recipe, SourceBlock, TuneBlock
from ernie_align.recipe.schema import fault

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import Trainer, TrainerCallback

    from ernie_align.data.load import Encoder, SourceStats
    from ernie_align.data.render import Renderer
    from ernie_align.data.sources import Source
    from ernie_align.models.architecture import Architecture, ParameterSpec
    from ernie_align.models.load import Bundle
    from ernie_align.models.trainable_parts import Target

# TRL keys that a recipe sets in another block, or that would break a guarantee of this toolkit -> what to do instead.
RESERVED_BY_EVERY_STAGE: Mapping[str, str] = {
    "output_dir": "set run.dir",
    "seed": "set run.seed",
    "data_seed": "set run.seed, which also orders the data",
    "model_init_kwargs": "set model.dtype, model.revision or model.attention",
    "trust_remote_code": "drop it: no remote code is ever run",
    "router_aux_loss_coef": "drop it: transformers pools text and vision experts in this loss, so it stays off",
    "max_length": "set data.max_length",
    "truncation_mode": "set data.overlong",
    "eos_token": "drop it: the checkpoint's chat template ends the turns",
    "pad_token": "drop it: the checkpoint's tokenizer defines it",
    "chat_template_path": "drop it: the checkpoint's own chat template is used",
    "remove_unused_columns": "drop it: the collator needs every column",
    "dataset_kwargs": "drop it: rows are encoded before TRL receives them",
    "dataset_text_field": "set data.format",
    "resume_from_checkpoint": "run with --resume",
    "disable_tqdm": "drop it: this toolkit shows its own progress bar",
    "do_train": "drop it: the stage decides",
    "do_eval": "name rows under data.eval",
    "do_predict": "run ernie-align eval",
    "use_cache": "drop it: training never uses a cache",
    "logging_nan_inf_filter": "drop it: a run stops at a loss or gradient that is not finite",
    "hub_token": "drop it: set HF_TOKEN, or run hf auth login",
    "enable_jit_checkpoint": "drop it: a run saves a checkpoint and stops when it receives SIGTERM",
    "hub_model_id": "drop it: push the finished folder, so that no unfinished model is published",
    "push_to_hub": "drop it: push the finished folder, so that no unfinished model is published",
}


@dataclass(frozen=True)
class ExtraSources:
    """Rows that a stage reads besides data.train and data.eval, and the encoder that turns them into examples."""

    sources: list[SourceBlock]
    encode: Encoder


@dataclass(frozen=True)
class Datasets:
    """Encoded examples of a run, with what became of the rows.

    renderer: rendered the rows; sources: of train, eval and extra, in this order; counts: rows of each source; extra:
    encoded rows of Stage.extra_sources, by name.
    """

    train: Dataset | IterableDataset
    eval: Dataset | IterableDataset | None
    renderer: Renderer
    sources: list[Source]
    counts: list[SourceStats]
    extra: Mapping[str, Dataset] = field(default_factory=dict)

    def row_name(self, source: int, row: int) -> str:
        """Return the file and line of the row behind an example, given its column `rows`."""
        return self.sources[source].row_name(row)

    def first(self) -> dict[str, Any]:
        """Return the first training example."""
        return next(iter(self.train))


@dataclass(frozen=True)
class MemoryProfile:
    """Memory use of a stage's training step. The defaults are those of supervised training.

    sequences_per_row: sequences in a training forward for each row of per_device_train_batch_size; min_sequences:
    sequences that must stay in one batch; shared_prompt: one sequence holds a prompt and both of its answers;
    reference_forward: the reference scores every batch or rollout; reference_in_step: it does so while the activations
    of the training forward are held; second_model: the reference is a second copy of the whole model; adapter_copies:
    frozen copies of the trained adapter; completion_length: tokens generated for each prompt; generations: completions
    of each prompt; batches_per_rollout: training batches that one rollout fills.
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


class Stage:
    """One way to align a model: its recipe, and the methods in which it differs from supervised training on rows.

    The docstring of a subclass is its help text on the command line.
    supports_tensor_parallel, supports_zero3_with_vision: launch layouts that its trainer can run with;
    samples_completions: it trains on completions that the policy samples, which differ between precisions and ranks.
    """

    name: ClassVar[str]
    recipe: ClassVar[type[Recipe]]
    supports_tensor_parallel: ClassVar[bool] = False
    supports_zero3_with_vision: ClassVar[bool] = False
    samples_completions: ClassVar[bool] = False

    @property
    def help(self) -> str:
        """The help text of the stage's command."""
        return type(self).__doc__ or ""

    def configure(self, recipe: Any, output_dir: str) -> Any:
        """Return TRL's config. Raises RecipeError if TRL rejects a value."""
        raise NotImplementedError

    def encoder(self, recipe: Any, renderer: Renderer) -> Encoder:
        """Return the encoder of canonical rows into examples."""
        raise NotImplementedError

    def build_trainer(
        self, recipe: Any, config: Any, bundle: Bundle, datasets: Datasets, callbacks: list[TrainerCallback]
    ) -> Trainer:
        """Return a TRL trainer that is ready to train."""
        raise NotImplementedError

    def trained_parameters(self, recipe: Any, architecture: Architecture) -> list[Target] | list[ParameterSpec]:
        """Return what the recipe trains, from names and shapes alone.

        Raises ModelError where a scope matches nothing, RecipeError where the recipe names nothing to train.
        """
        adapter, tune = _trained_blocks(recipe)
        return adapter_targets(architecture, adapter) if adapter is not None else tuned_parameters(architecture, tune)

    def prepare_model(self, recipe: Any, bundle: Bundle) -> list[Target] | list[ParameterSpec]:
        """Attach the adapter to the loaded model, or unfreeze the tuned parameters; return what is trained."""
        adapter, tune = _trained_blocks(recipe)
        return attach_adapter(bundle, adapter) if adapter is not None else unfreeze(bundle, tune)

    def extra_sources(self, recipe: Any, renderer: Renderer) -> dict[str, ExtraSources]:
        """Return what is read besides data.train and data.eval, by name. Default: nothing."""
        return {}

    def preflight(self, recipe: Any, architecture: Architecture, example: dict[str, Any]) -> list[str]:
        """Check what can be checked with one example and no weights; return lines for the user. Default: no checks."""
        return []

    def batching_summary(self, recipe: Any, lengths: list[int] | None) -> list[str]:
        """Return lines on how training rows of these lengths (None: a stream) make up batches. Default: none."""
        return []

    def needs_unsharded_model(self, recipe: Any) -> str:
        """Return why every rank needs the whole model before FSDP2 shards it, or "" (default) if none does."""
        return ""

    def memory_profile(self, recipe: Any) -> MemoryProfile:
        """Return how a training step uses memory, for `ernie-align plan`."""
        return MemoryProfile()


def _trained_blocks(recipe: Any) -> tuple[AdapterBlock | None, TuneBlock | None]:
    adapter, tune = getattr(recipe, "adapter", None), getattr(recipe, "tune", None)
    if adapter is None and tune is None:
        fix = "write adapter: {scopes: [...]} or tune: {scopes: all}, or name an adapter to continue as model.name"
        raise RecipeError.at(recipe.where("adapter"), "nothing says what is trained", fix=fix)
    return adapter, tune


def validate_padding(training: Mapping[str, Any], *, padding_free: bool = False) -> None:
    """Raise a fault if training.pad_to_multiple_of (TRL takes a number, its text, `auto` or `none`) is not a length, or
    if rows are not padded at all."""
    multiple = training.get("pad_to_multiple_of")
    if not isinstance(multiple, (int, str)) or multiple == "auto" or str(multiple).lower() in ("none", "null"):
        return
    if padding_free:
        what, why = f"pad_to_multiple_of {multiple} without padding", "rows are concatenated"
        raise fault("training", what, why=why, fix="drop it, or drop packing and padding_free")
    if not str(multiple).isdecimal() or int(multiple) == 0:
        what = f"pad_to_multiple_of {multiple} is not a length"
        raise fault("training", what, fix="set a whole number over 0, or drop it")


def trl_config(cls: type, recipe: Recipe, *, output_dir: str, **reserved: Any) -> Any:
    """Build TRL's config from the recipe's `training:` keys and the values that the stage sets itself.

    save_total_limit is withheld: older checkpoints are deleted once the new one is complete (runs.callbacks).
    Raises RecipeError if TRL or transformers rejects a value.
    """
    try:
        return cls(
            **{**inherited_defaults(recipe), **recipe.training, "save_total_limit": None, **reserved},
            output_dir=output_dir,
            seed=recipe.run.seed,
            data_seed=recipe.run.seed,
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_nan_inf_filter=False,
        )
    except (TypeError, ValueError, ImportError) as error:
        message = str(error).splitlines()[0]
        raise RecipeError.at(recipe.where("training"), f"{cls.__name__} rejects it: {message}") from error


def inherited_defaults(recipe: Recipe) -> dict[str, Any]:
    """Return defaults that differ from TRL's because the recipe or the machine implies another value."""
    import torch

    defaults: dict[str, Any] = {
        # TRL's default is bf16 autocast for every model; weights loaded in float32 are also computed in float32
        "bf16": recipe.model.dtype == "bfloat16" and not recipe.training.get("fp16"),
        "report_to": ["tensorboard"],
    }
    if not torch.accelerator.is_available():
        defaults["use_cpu"] = True  # transformers refuses bf16 without it
    if "WORLD_SIZE" in os.environ:  # started by a launcher
        # every rank uses every part (models.distributed.dummy_vision): a search for unused ones costs time and reports
        # false ones
        defaults["ddp_find_unused_parameters"] = False
        if recipe.data.streaming:
            # by default rank 0 reads for all and splits its batches into equal pieces, which images do not have
            defaults["accelerator_config"] = {"dispatch_batches": False}
    if recipe.data.eval and "eval_steps" in recipe.training:
        defaults["eval_strategy"] = "steps"
    return {key: value for key, value in defaults.items() if key not in recipe.training}
