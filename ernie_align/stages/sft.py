"""The stages sft and lora: their recipes, and how they become TRL's SFTTrainer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field, create_model, model_validator

from ernie_align.data.collate import Collator, PaddingFreeCollator, RowEncoder
from ernie_align.data.packing import WINDOW, best_fit_decreasing, pack, pack_stream, padding_fraction
from ernie_align.errors import RecipeError
from ernie_align.models.adapters import attach_adapter, unfreeze
from ernie_align.models.trainable_parts import adapter_targets, tuned_parameters
from ernie_align.recipe import AdapterBlock, Recipe, TuneBlock
from ernie_align.recipe.schema import fault
from ernie_align.stages.base import RESERVED_BY_EVERY_STAGE, Datasets, Stage, trl_config, validate_padding
from ernie_align.stages.trl_keys import SFT_CONFIG, training_model

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback
    from trl import SFTConfig

    from ernie_align.data.render import Renderer
    from ernie_align.models.load import Bundle

_OWNED = {
    **RESERVED_BY_EVERY_STAGE,
    "completion_only_loss": "drop it: answers are trained, and a turn with label 0 is not",
    "assistant_only_loss": "drop it: answers are trained, and a turn with label 0 is not",
    "eval_packing": "drop it: held-out rows are never packed, and with packing or padding_free they are not padded",
    "shuffle_dataset": "drop it: rows are shuffled by run.seed",
}
_OWNED_BY_SFT = {
    **_OWNED,
    # transformers reloads the best weights with strict=False, which finds 3 of 98 tensors of a VL model
    "load_best_model_at_end": "drop it: keep the checkpoints and choose one with ernie-align eval",
}


class _Supervised(Recipe):
    @classmethod
    def training_model(cls) -> type[BaseModel]:
        """See Recipe."""
        return _training_model(frozenset(cls.reserved_training_keys()))

    @model_validator(mode="after")
    def _a_strategy_has_packs(self) -> _Supervised:
        if self.training.get("packing_strategy") and not self.training.get("packing"):
            raise fault("training", "packing_strategy without packing", fix="set training.packing: true, or drop it")
        return self

    @model_validator(mode="after")
    def _rows_are_padded_to_a_multiple(self) -> _Supervised:
        validate_padding(self.training, flat=is_flat(self))
        return self


@functools.cache
def _training_model(owned: frozenset[str]) -> type[BaseModel]:
    """TRL's keys. Of its packing strategies the one that leaves rows whole: the others cut answers and images."""
    model = training_model(SFT_CONFIG, owned)
    return create_model(model.__name__, __base__=model, packing_strategy=(Literal["bfd"] | None, None))


class SftRecipe(_Supervised):
    """Full fine-tuning of the parts in `tune.scopes`."""

    stage: Literal["sft"]
    tune: TuneBlock = Field(default_factory=TuneBlock)

    keys_of_other_stages: ClassVar[Mapping[str, str]] = {
        "adapter": "adapters are trained by stage: lora; here write tune:"
    }

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        """See Recipe."""
        return _OWNED_BY_SFT


class LoraRecipe(_Supervised):
    """LoRA adapters on the parts in `adapter.scopes`; the model itself stays as it is."""

    stage: Literal["lora"]
    adapter: AdapterBlock

    keys_of_other_stages: ClassVar[Mapping[str, str]] = {
        "tune": "weights are trained by stage: sft; here write adapter:"
    }

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        """See Recipe."""
        return _OWNED


def _encode(recipe: SftRecipe | LoraRecipe, renderer: Renderer) -> RowEncoder:
    return RowEncoder(renderer, max_length=recipe.data.max_length, cut=recipe.data.overlong == "cut")


def _configure(recipe: SftRecipe | LoraRecipe, output_dir: str) -> SFTConfig:
    from trl import SFTConfig

    return trl_config(
        SFTConfig,
        recipe,
        output_dir=output_dir,
        router_aux_loss_coef=0.0,
        max_length=None,  # rows are already judged by length
        packing=False,  # packs are made here, where TRL knows no images
        padding_free=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _build_trainer(
    recipe: SftRecipe | LoraRecipe,
    config: SFTConfig,
    bundle: Bundle,
    batches: Datasets,
    callbacks: list[TrainerCallback],
) -> Trainer:
    from ernie_align.models.packed_attention import use_per_document_attention
    from ernie_align.stages.sft_trainer import SupervisedTrainer

    train, images = batches.train, {"image_processor": bundle.image_processor, "row_name": batches.row_name}
    if is_flat(recipe):
        collator: Any = PaddingFreeCollator(batches.train, **images)
        use_per_document_attention(bundle.model)
    else:
        collator = Collator(bundle.tokenizer.pad_token_id, pad_to_multiple_of=config.pad_to_multiple_of, **images)
    if recipe.training.get("packing"):
        packed = pack_stream if recipe.data.streaming else pack
        train = packed(batches.train, recipe.data.max_length, seed=recipe.run.seed)
    trainer = SupervisedTrainer(
        model=bundle.model,
        args=config,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=batches.eval,
        processing_class=bundle.processor,
        callbacks=callbacks,
        row_name=batches.row_name,
    )
    shared = trainer.accelerator.parallelism_config
    if is_flat(recipe) and shared is not None and (shared.cp_enabled or shared.sp_enabled):
        what, fix = "rows without padding, and a sequence shared by processes", "drop packing and padding_free"
        raise RecipeError.at(recipe.where("training"), what, why="a row would go on in another's positions", fix=fix)
    return trainer


def is_flat(recipe: Recipe) -> bool:
    """Whether the rows of a batch are laid end to end: packed, or as they are drawn."""
    return bool(recipe.training.get("packing") or recipe.training.get("padding_free"))


def _layout(recipe: SftRecipe | LoraRecipe, lengths: list[int] | None) -> list[str]:
    """What packing does to rows of these lengths, and what it spares."""
    if not is_flat(recipe):
        return []
    size = recipe.training.get("per_device_train_batch_size") or 8
    seed, capacity = recipe.run.seed, recipe.data.max_length
    if not recipe.training.get("packing"):
        spared = f"; padded, they would be {padding_fraction(lengths, size, seed=seed):.1%} padding" if lengths else ""
        return [f"padding_free: the {size} rows of a batch are laid end to end{spared}"]
    if lengths is None:
        return [f"packing: the stream is packed {WINDOW} rows at a time, into packs of up to {capacity} tokens"]
    packs = len(best_fit_decreasing(lengths, capacity, seed=seed))
    rows = max(1, round(size * len(lengths) / packs))
    full, spared = sum(lengths) / (packs * capacity), padding_fraction(lengths, rows, seed=seed)
    return [
        f"packing: {len(lengths):,} rows in {packs:,} packs of up to {capacity} tokens, {full:.1%} full; "
        f"a batch of {size} packs holds about {rows} rows, and padded these would be {spared:.1%} padding"
    ]


SFT = Stage(
    name="sft",
    help="Full fine-tuning of the parts that tune.scopes names.",
    recipe=SftRecipe,
    scope=lambda recipe, architecture: tuned_parameters(architecture, recipe.tune),
    wrap=lambda recipe, bundle: unfreeze(bundle, recipe.tune),
    configure=_configure,
    encode=_encode,
    build_trainer=_build_trainer,
    layout=_layout,
)
LORA = Stage(
    name="lora",
    help="LoRA adapters on the parts that adapter.scopes names.",
    recipe=LoraRecipe,
    scope=lambda recipe, architecture: adapter_targets(architecture, recipe.adapter),
    wrap=lambda recipe, bundle: attach_adapter(bundle, recipe.adapter),
    configure=_configure,
    encode=_encode,
    build_trainer=_build_trainer,
    layout=_layout,
)
