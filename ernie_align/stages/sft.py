"""The stages sft and lora: their recipes, and how they become TRL's SFTTrainer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field, create_model, model_validator

from ernie_align.data.collate import Collator, PaddingFreeCollator, RowEncoder
from ernie_align.data.packing import WINDOW, best_fit_decreasing, pack, pack_stream, padding_fraction
from ernie_align.errors import RecipeError
from ernie_align.recipe import AdapterBlock, Recipe, TuneBlock
from ernie_align.recipe.schema import fault
from ernie_align.stages.base import RESERVED_BY_EVERY_STAGE, Datasets, Stage, trl_config, validate_padding
from ernie_align.stages.trl_keys import SFT_CONFIG, training_model

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback
    from trl import SFTConfig

    from ernie_align.data.render import Renderer
    from ernie_align.models.load import Bundle

_RESERVED = {
    **RESERVED_BY_EVERY_STAGE,
    "completion_only_loss": "drop it: answers are trained, except a turn with label 0",
    "assistant_only_loss": "drop it: answers are trained, except a turn with label 0",
    "eval_packing": "drop it: held-out rows are never packed, and with packing or padding_free they are not padded",
    "shuffle_dataset": "drop it: rows are shuffled by run.seed",
}
_RESERVED_BY_SFT = {
    **_RESERVED,
    # transformers reloads the best weights with strict=False, which matches 3 of 98 tensors of a VL model
    "load_best_model_at_end": "drop it: keep the checkpoints and choose one with ernie-align eval",
}


class _SupervisedRecipe(Recipe):
    @classmethod
    def training_model(cls) -> type[BaseModel]:
        return _training_model(frozenset(cls.reserved_training_keys()))

    @model_validator(mode="after")
    def _packing_strategy_needs_packing(self) -> _SupervisedRecipe:
        if self.training.get("packing_strategy") and not self.training.get("packing"):
            raise fault("training", "packing_strategy without packing", fix="set training.packing: true, or drop it")
        return self

    @model_validator(mode="after")
    def _validate_padding(self) -> _SupervisedRecipe:
        validate_padding(self.training, padding_free=is_padding_free(self))
        return self


@functools.cache
def _training_model(reserved: frozenset[str]) -> type[BaseModel]:
    """TRL's keys, with the one packing strategy that keeps rows whole: the others split answers and images."""
    model = training_model(SFT_CONFIG, reserved)
    return create_model(model.__name__, __base__=model, packing_strategy=(Literal["bfd"] | None, None))


class SftRecipe(_SupervisedRecipe):
    """Full fine-tuning of the parts in `tune.scopes`."""

    stage: Literal["sft"]
    tune: TuneBlock = Field(default_factory=TuneBlock)

    keys_of_other_stages: ClassVar[Mapping[str, str]] = {
        "adapter": "adapters are trained by stage: lora; here write tune:"
    }

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        return _RESERVED_BY_SFT


class LoraRecipe(_SupervisedRecipe):
    """LoRA adapters on the parts in `adapter.scopes`; the model's own weights stay frozen."""

    stage: Literal["lora"]
    adapter: AdapterBlock

    keys_of_other_stages: ClassVar[Mapping[str, str]] = {
        "tune": "weights are trained by stage: sft; here write adapter:"
    }

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        return _RESERVED


def is_padding_free(recipe: Recipe) -> bool:
    """Return whether the rows of a batch are concatenated instead of padded, packed or not."""
    return bool(recipe.training.get("packing") or recipe.training.get("padding_free"))


class _SupervisedStage(Stage):
    supports_tensor_parallel = True
    supports_zero3_with_vision = True

    def configure(self, recipe: SftRecipe | LoraRecipe, output_dir: str) -> SFTConfig:
        from trl import SFTConfig

        return trl_config(
            SFTConfig,
            recipe,
            output_dir=output_dir,
            router_aux_loss_coef=0.0,
            max_length=None,  # the encoder has enforced data.max_length
            packing=False,  # rows are packed here: TRL's packing does not support images
            padding_free=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )

    def encoder(self, recipe: SftRecipe | LoraRecipe, renderer: Renderer) -> RowEncoder:
        return RowEncoder(renderer, max_length=recipe.data.max_length, cut=recipe.data.overlong == "cut")

    def build_trainer(
        self,
        recipe: SftRecipe | LoraRecipe,
        config: SFTConfig,
        bundle: Bundle,
        datasets: Datasets,
        callbacks: list[TrainerCallback],
    ) -> Trainer:
        from ernie_align.models.packed_attention import use_per_document_attention
        from ernie_align.stages.sft_trainer import SupervisedTrainer

        train, images = datasets.train, {"image_processor": bundle.image_processor, "row_name": datasets.row_name}
        if is_padding_free(recipe):
            collator: Any = PaddingFreeCollator(train, **images)
            use_per_document_attention(bundle.model)
        else:
            collator = Collator(bundle.tokenizer.pad_token_id, pad_to_multiple_of=config.pad_to_multiple_of, **images)
        if recipe.training.get("packing"):
            packed = pack_stream if recipe.data.streaming else pack
            train = packed(train, recipe.data.max_length, seed=recipe.run.seed)
        trainer = SupervisedTrainer(
            model=bundle.model,
            args=config,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=datasets.eval,
            processing_class=bundle.processor,
            callbacks=callbacks,
            row_name=datasets.row_name,
        )
        layout = trainer.accelerator.parallelism_config
        if is_padding_free(recipe) and layout is not None and (layout.cp_enabled or layout.sp_enabled):
            what = "packing or padding_free with context or sequence parallelism"
            why = "a row would continue at the positions of another row"
            fix = "drop packing and padding_free"
            raise RecipeError.at(recipe.where("training"), what, why=why, fix=fix)
        return trainer

    def batching_summary(self, recipe: SftRecipe | LoraRecipe, lengths: list[int] | None) -> list[str]:
        """Return what packing does to rows of these lengths, and how much padding it saves."""
        if not is_padding_free(recipe):
            return []
        size = recipe.training.get("per_device_train_batch_size") or 8
        seed, capacity = recipe.run.seed, recipe.data.max_length
        if not recipe.training.get("packing"):
            padding = (
                f"; padded, they would be {padding_fraction(lengths, size, seed=seed):.1%} padding" if lengths else ""
            )
            return [f"padding_free: the {size} rows of a batch are concatenated{padding}"]
        if lengths is None:
            return [f"packing: the stream is packed {WINDOW} rows at a time, into packs of up to {capacity} tokens"]
        packs = len(best_fit_decreasing(lengths, capacity, seed=seed))
        rows = max(1, round(size * len(lengths) / packs))
        full, padding = sum(lengths) / (packs * capacity), padding_fraction(lengths, rows, seed=seed)
        return [
            f"packing: {len(lengths):,} rows in {packs:,} packs of up to {capacity} tokens, {full:.1%} full; "
            f"a batch of {size} packs holds about {rows} rows, which would be {padding:.1%} padding if padded"
        ]


class SftStage(_SupervisedStage):
    """Full fine-tuning of the parts that tune.scopes names."""

    name = "sft"
    recipe = SftRecipe


class LoraStage(_SupervisedStage):
    """LoRA adapters on the parts that adapter.scopes names."""

    name = "lora"
    recipe = LoraRecipe
