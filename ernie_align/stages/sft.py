"""The stages sft and lora: their recipes, and how they become TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, Field

from ernie_align.data.collate import Collator, RowEncoder
from ernie_align.models.adapters import attach, unfreeze
from ernie_align.models.scopes import adapter_targets, tuned_tensors
from ernie_align.recipe import AdapterBlock, Recipe, TuneBlock
from ernie_align.stages.base import OWNED_BY_EVERY_STAGE, Batches, Stage, trl_config
from ernie_align.stages.upstream import SFT_CONFIG, training_model

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback
    from trl import SFTConfig

    from ernie_align.data.render import Renderer
    from ernie_align.models.load import Bundle

_OWNED = {
    **OWNED_BY_EVERY_STAGE,
    "completion_only_loss": "drop it: answers are trained, and a turn with label 0 is not",
    "assistant_only_loss": "drop it: answers are trained, and a turn with label 0 is not",
    "packing": "drop it: packed rows would see one another in this model",
    "eval_packing": "drop it: packed rows would see one another in this model",
    "packing_strategy": "drop it: packed rows would see one another in this model",
    "padding_free": "drop it: rows without padding would see one another in this model",
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
        return training_model(SFT_CONFIG, frozenset(cls.owned_training_keys()))


class SftRecipe(_Supervised):
    """Full fine-tuning of the parts in `tune.scopes`."""

    stage: Literal["sft"]
    tune: TuneBlock = Field(default_factory=TuneBlock)

    elsewhere: ClassVar[Mapping[str, str]] = {"adapter": "adapters are trained by stage: lora; here write tune:"}

    @classmethod
    def owned_training_keys(cls) -> Mapping[str, str]:
        """See Recipe."""
        return _OWNED_BY_SFT


class LoraRecipe(_Supervised):
    """LoRA adapters on the parts in `adapter.scopes`; the model itself stays as it is."""

    stage: Literal["lora"]
    adapter: AdapterBlock

    elsewhere: ClassVar[Mapping[str, str]] = {"tune": "weights are trained by stage: sft; here write adapter:"}

    @classmethod
    def owned_training_keys(cls) -> Mapping[str, str]:
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
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _build_trainer(
    recipe: SftRecipe | LoraRecipe,
    config: SFTConfig,
    bundle: Bundle,
    batches: Batches,
    callbacks: list[TrainerCallback],
) -> Trainer:
    from ernie_align.stages.sft_trainer import SupervisedTrainer

    return SupervisedTrainer(
        model=bundle.model,
        args=config,
        data_collator=Collator(
            bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor, row_name=batches.row_name
        ),
        train_dataset=batches.train,
        eval_dataset=batches.eval,
        processing_class=bundle.processor,
        callbacks=callbacks,
        row_name=batches.row_name,
    )


SFT = Stage(
    name="sft",
    help="Full fine-tuning of the parts that tune.scopes names.",
    recipe=SftRecipe,
    scope=lambda recipe, anatomy: tuned_tensors(anatomy, recipe.tune),
    wrap=lambda recipe, bundle: unfreeze(bundle, recipe.tune),
    configure=_configure,
    encode=_encode,
    build_trainer=_build_trainer,
)
LORA = Stage(
    name="lora",
    help="LoRA adapters on the parts that adapter.scopes names.",
    recipe=LoraRecipe,
    scope=lambda recipe, anatomy: adapter_targets(anatomy, recipe.adapter),
    wrap=lambda recipe, bundle: attach(bundle, recipe.adapter),
    configure=_configure,
    encode=_encode,
    build_trainer=_build_trainer,
)
