"""The stage kto: its recipe, and how it becomes TRL's KTOTrainer.

The trainer class is in kto_trainer.py, as for every stage: a recipe is read without importing torch or TRL.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, model_validator

from ernie_align.data.unpaired import UnpairedCollator, UnpairedEncoder
from ernie_align.recipe import Block
from ernie_align.recipe.schema import fault
from ernie_align.stages.base import (
    RESERVED_BY_EVERY_STAGE,
    Datasets,
    MemoryProfile,
    Stage,
    trl_config,
    validate_padding,
)
from ernie_align.stages.reference import REFERENCE_STAYS, PolicyRecipe, load_reference_model
from ernie_align.stages.trl_keys import KTO_CONFIG, training_model

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback
    from trl import KTOConfig

    from ernie_align.data.render import Renderer
    from ernie_align.models.load import Bundle

_log = logging.getLogger(__name__)

_TRL_LOSS_KEYS = ("beta", "loss_type", "desirable_weight", "undesirable_weight")
_RESERVED = {
    **RESERVED_BY_EVERY_STAGE,
    **REFERENCE_STAYS,
    **{key: f"set kto.{key}" for key in _TRL_LOSS_KEYS},
    "precompute_ref_log_probs": "drop it: the reference is computed with each batch",
    "precompute_ref_batch_size": "drop it: the reference is computed with each batch",
    "train_sampling_strategy": "drop it: rows are shuffled by run.seed",
}
# eq. 8 of the KTO paper: 1 <= desirable_weight · desirable / (undesirable_weight · undesirable) <= 4/3
_BALANCE = 4 / 3


class KtoBlock(Block):
    """The loss on labeled completions."""

    beta: float = Field(0.1, gt=0, description="How strongly the policy is held to the reference")
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="TRL's loss types; apo_zero_unpaired has no KL term"
    )
    desirable_weight: float = Field(1.0, ge=0, description="Weight of the rows with label: true")
    undesirable_weight: float = Field(1.0, ge=0, description="Weight of the rows with label: false")


class KtoRecipe(PolicyRecipe):
    """Training on unpaired rows with `label: true` or `label: false`."""

    stage: Literal["kto"]
    kto: KtoBlock = Field(default_factory=KtoBlock)

    @classmethod
    def training_model(cls) -> type[BaseModel]:
        return training_model(KTO_CONFIG, frozenset(_RESERVED))

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        return _RESERVED

    @model_validator(mode="after")
    def _kl_needs_two_rows(self) -> KtoRecipe:
        validate_padding(self.training)
        if self.kto.loss_type == "kto" and self.training.get("per_device_train_batch_size") == 1:
            raise fault(
                "training",
                "per_device_train_batch_size 1 with kto.loss_type kto",
                why="the KL term pairs each prompt with the completion of another row of its batch",
                fix="set per_device_train_batch_size: 2 or more, or kto.loss_type: apo_zero_unpaired",
            )
        return self


class KtoStage(Stage):
    """Preference training on single answers labeled true or false, images included."""

    name = "kto"
    recipe = KtoRecipe

    def configure(self, recipe: KtoRecipe, output_dir: str) -> KTOConfig:
        from trl import KTOConfig

        return trl_config(
            KTOConfig,
            recipe,
            output_dir=output_dir,
            router_aux_loss_coef=0.0,
            max_length=None,  # the encoder has enforced data.max_length
            train_sampling_strategy="sequential",  # TRL's constructor demands it; UnpairedTrainer shuffles
            **{key: getattr(recipe.kto, key) for key in _TRL_LOSS_KEYS},
        )

    def encoder(self, recipe: KtoRecipe, renderer: Renderer) -> UnpairedEncoder:
        return UnpairedEncoder(renderer, max_length=recipe.data.max_length, cut=recipe.data.overlong == "cut")

    def needs_unsharded_model(self, recipe: KtoRecipe) -> str:
        return "the reference is a second model" if recipe.adapter is None else ""

    def memory_profile(self, recipe: KtoRecipe) -> MemoryProfile:
        return MemoryProfile(
            min_sequences=2 if recipe.kto.loss_type == "kto" else 1,
            reference_forward=True,
            second_model=recipe.adapter is None,
            adapter_copies=int(recipe.continues_adapter),
        )

    def build_trainer(
        self,
        recipe: KtoRecipe,
        config: KTOConfig,
        bundle: Bundle,
        datasets: Datasets,
        callbacks: list[TrainerCallback],
    ) -> Trainer:
        from ernie_align.stages.kto_trainer import UnpairedTrainer

        if not recipe.data.streaming:
            _warn_about_balance(recipe.kto, datasets.train["label"][:])
        return UnpairedTrainer(
            model=bundle.model,
            ref_model=load_reference_model(recipe, bundle) if recipe.adapter is None else None,
            args=config,
            data_collator=UnpairedCollator(
                bundle.tokenizer.pad_token_id,
                max_length=recipe.data.max_length,
                kl=recipe.kto.loss_type == "kto",
                image_processor=bundle.image_processor,
                row_name=datasets.row_name,
                pad_to_multiple_of=config.pad_to_multiple_of,
            ),
            train_dataset=datasets.train,
            eval_dataset=datasets.eval,
            processing_class=bundle.processor,
            callbacks=callbacks,
            row_name=datasets.row_name,
            continues_adapter=recipe.continues_adapter,
        )


def _warn_about_balance(block: KtoBlock, labels: list[bool]) -> None:
    """Warn if the weighted numbers of desirable and undesirable rows are outside the range of the KTO paper."""
    desirable, undesirable = max(sum(labels), 1), max(len(labels) - sum(labels), 1)
    lowest = block.undesirable_weight * undesirable / desirable
    if not lowest <= block.desirable_weight <= _BALANCE * lowest:
        _log.warning(
            f"{sum(labels)} rows with label: true and {len(labels) - sum(labels)} with label: false: for sides of "
            f"about equal weight set kto.desirable_weight between {lowest:.3g} and {_BALANCE * lowest:.3g}"
        )
