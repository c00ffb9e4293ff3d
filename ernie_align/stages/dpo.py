"""The stage dpo: its recipe, and how it becomes TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from ernie_align.data.pairs import PairCollator, PairEncoder, SharedPromptCollator
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
from ernie_align.stages.reference import REFERENCE_STAYS, PolicyRecipe, load_reference_model, precomputed_reference
from ernie_align.stages.trl_keys import DPO_CONFIG, training_model

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback
    from trl import DPOConfig

    from ernie_align.data.render import Renderer
    from ernie_align.models.load import Bundle

# Keys of TRL's config that define the loss: written under dpo:, with TRL's own names.
_TRL_LOSS_KEYS = (
    "beta", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting",
    "discopop_tau",
)  # fmt: skip
_EXTRA_LOSSES = ("simpo", "dpop")
_REFERENCE_FREE = frozenset({"simpo", "sft"})
_LENGTH_NORMALIZED = frozenset({"simpo", "ipo", "sigmoid_norm", "sft"})

_RESERVED = {
    **RESERVED_BY_EVERY_STAGE,
    **REFERENCE_STAYS,
    **{key: f"set dpo.{key}" for key in (*_TRL_LOSS_KEYS, "loss_type", "loss_weights")},
    "precompute_ref_log_probs": "set dpo.reference: precomputed",
    "padding_free": "drop it: without padding, rows would attend to each other in this model",
}

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "dpop",
]  # fmt: skip


class DpoBlock(Block):
    """The preference loss, its reference, and the pairs it is computed on."""

    beta: float = Field(0.1, gt=0, description="How strongly the policy is held to the reference; for ipo its τ")
    loss_type: list[LossType] = Field(["sigmoid"], min_length=1, description="TRL's loss types, and simpo and dpop")
    loss_weights: list[float] | None = Field(None, description="One for each loss type; 1.0 each if left out")
    length_normalize: bool = Field(
        False, description="Scale each log-probability by mean length / own length, as the official toolkit does"
    )
    sft_weight: float = Field(0.0, ge=0, description="Weight of the chosen answers' mean negative log-likelihood")
    simpo_gamma: float = Field(0.5, description="Margin of simpo")
    dpop_lambda: float = Field(50.0, ge=0, description="Weight of dpop's penalty; 50 in its paper")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of pairs assumed to be labeled the wrong way round"
    )
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="LD-DPO: weight of the tokens beyond the shorter answer's length"
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="f-DPO: the divergence from the reference"
    )
    f_alpha_divergence_coef: float = Field(0.5, description="Coefficient of alpha_divergence")
    use_weighting: bool = Field(False, description="WPO: weight pairs by their probability under the policy")
    discopop_tau: float = Field(0.05, gt=0, description="Temperature of discopop")
    reference: Literal["auto", "precomputed"] = Field(
        "auto",
        description="auto: adapters off, or a frozen copy of adapter or model; precomputed: computed once and kept",
    )
    shared_prompt: bool = Field(
        False, description="Compute each prompt once, in one row with both answers: the same loss for less work"
    )
    pairs: Literal["best_worst", "adjacent", "all"] = Field(
        "best_worst", description="Pairs made from a row of more than two ranked answers"
    )
    bad_pairs: Literal["stop", "drop"] = Field(
        "stop", description="Pairs with equal sides, an empty one, or an image in only one: stop the run, or drop them"
    )

    @property
    def reference_free(self) -> bool:
        """No loss uses a reference."""
        return set(self.loss_type) <= _REFERENCE_FREE

    @property
    def weights(self) -> list[float]:
        """One weight for each loss type."""
        return self.loss_weights or [1.0] * len(self.loss_type)

    @model_validator(mode="after")
    def _validate_losses(self) -> DpoBlock:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            what = f"{len(self.loss_weights)} weights for {len(self.loss_type)} loss types"
            raise fault("loss_weights", what, fix="give one for each, in their order")
        normalized = [name for name in self.loss_type if name in _LENGTH_NORMALIZED]
        if self.length_normalize and normalized:
            fix = f"set it to false, or drop {', '.join(normalized)} (for sft: set dpo.sft_weight)"
            raise fault("length_normalize", f"{', '.join(normalized)} already normalizes by length", fix=fix)
        if self.length_normalize and (self.use_weighting or self.ld_alpha is not None):
            raise fault(
                "length_normalize", "with use_weighting or ld_alpha, which weight tokens", fix="choose one of them"
            )
        own = [name for name in self.loss_type if name in _EXTRA_LOSSES]
        if own and (self.f_divergence_type != "reverse_kl" or self.use_weighting or self.ld_alpha is not None):
            what = f"{', '.join(own)} with f_divergence_type, use_weighting or ld_alpha"
            raise fault("loss_type", what, fix="leave these at their defaults: they apply to TRL's losses only")
        return self


class DpoRecipe(PolicyRecipe):
    """Preference training of adapters (`adapter:`), or of the parts in `tune.scopes`."""

    stage: Literal["dpo"]
    dpo: DpoBlock = Field(default_factory=DpoBlock)

    @classmethod
    def training_model(cls) -> type[BaseModel]:
        return training_model(DPO_CONFIG, frozenset(_RESERVED))

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        return _RESERVED

    @model_validator(mode="after")
    def _shared_prompt_needs_a_mask(self) -> DpoRecipe:
        if self.dpo.shared_prompt and self.model.attention not in ("sdpa", "eager"):
            raise fault(
                "dpo",
                f"shared_prompt with attention {self.model.attention}",
                why="chosen and rejected share a row under a custom mask, which flash attention does not support",
                fix="set model.attention: sdpa, or dpo.shared_prompt: false",
            )
        return self

    @model_validator(mode="after")
    def _validate_padding(self) -> DpoRecipe:
        validate_padding(self.training)
        return self

    @model_validator(mode="after")
    def _precomputed_reference_needs_rows(self) -> DpoRecipe:
        if self.dpo.reference == "precomputed" and self.data.streaming:
            raise fault(
                "dpo",
                "reference: precomputed with data.streaming",
                fix="set data.streaming: false, or dpo.reference: auto",
            )
        return self


def _extra_losses(block: DpoBlock) -> list[tuple[Callable[..., Any], float]]:
    import ernie_align.losses as losses

    def simpo(policy, reference, lengths):
        return losses.simpo(*policy, *lengths, beta=block.beta, gamma=block.simpo_gamma)

    def dpop(policy, reference, lengths):
        ratios = (logps - ref_logps for logps, ref_logps in zip(policy, reference, strict=True))
        return losses.dpop(*ratios, beta=block.beta, lambda_=block.dpop_lambda)

    known = {"simpo": simpo, "dpop": dpop}
    return [(known[name], weight) for name, weight in zip(block.loss_type, block.weights, strict=True) if name in known]


class DpoStage(Stage):
    """Preference training on chosen and rejected answers, images included."""

    name = "dpo"
    recipe = DpoRecipe

    def configure(self, recipe: DpoRecipe, output_dir: str) -> DPOConfig:
        from trl import DPOConfig

        block = recipe.dpo
        trl_losses = [pair for pair in zip(block.loss_type, block.weights, strict=True) if pair[0] not in _EXTRA_LOSSES]
        return trl_config(
            DPOConfig,
            recipe,
            output_dir=output_dir,
            router_aux_loss_coef=0.0,
            max_length=None,  # the encoder has enforced data.max_length
            loss_type=[name for name, _ in trl_losses],
            loss_weights=[weight for _, weight in trl_losses],
            # keeps TRL from building its own reference in full fine-tuning; PreferenceTrainer decides
            precompute_ref_log_probs=recipe.adapter is None and not _has_second_model(recipe),
            **{key: getattr(block, key) for key in _TRL_LOSS_KEYS},
        )

    def encoder(self, recipe: DpoRecipe, renderer: Renderer) -> PairEncoder:
        return PairEncoder(
            renderer,
            max_length=recipe.data.max_length,
            cut=recipe.data.overlong == "cut",
            pairing=recipe.dpo.pairs,
            drop_bad_pairs=recipe.dpo.bad_pairs == "drop",
        )

    def needs_unsharded_model(self, recipe: DpoRecipe) -> str:
        if _has_second_model(recipe):
            return "the reference is a second model"
        precomputed = recipe.dpo.reference == "precomputed" and not recipe.dpo.reference_free
        return "reference: precomputed runs before the model is sharded" if precomputed else ""

    def memory_profile(self, recipe: DpoRecipe) -> MemoryProfile:
        sequences = 1 if recipe.dpo.shared_prompt else 2
        reference_forward = not recipe.dpo.reference_free and recipe.dpo.reference == "auto"
        return MemoryProfile(
            sequences_per_row=sequences,
            min_sequences=sequences,
            shared_prompt=recipe.dpo.shared_prompt,
            reference_forward=reference_forward,
            reference_in_step=reference_forward,
            second_model=_has_second_model(recipe),
            adapter_copies=int(recipe.continues_adapter),
        )

    def build_trainer(
        self,
        recipe: DpoRecipe,
        config: DPOConfig,
        bundle: Bundle,
        datasets: Datasets,
        callbacks: list[TrainerCallback],
    ) -> Trainer:
        from ernie_align.stages.dpo_trainer import PreferenceTrainer

        block = recipe.dpo
        collator = SharedPromptCollator if block.shared_prompt else PairCollator
        stored = None
        if block.reference == "precomputed" and not block.reference_free:
            stored = precomputed_reference(
                recipe, bundle, Path(config.output_dir), depends_on=f"ld_alpha {block.ld_alpha}"
            )
        return PreferenceTrainer(
            model=bundle.model,
            ref_model=load_reference_model(recipe, bundle) if _has_second_model(recipe) else None,
            args=config,
            data_collator=collator(
                bundle.tokenizer.pad_token_id,
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
            reference_free=block.reference_free,
            length_normalize=block.length_normalize,
            sft_weight=block.sft_weight,
            extra_losses=_extra_losses(block),
            stored=stored,
        )


def _has_second_model(recipe: DpoRecipe) -> bool:
    """Return whether full fine-tuning is compared to a second, frozen model."""
    return recipe.adapter is None and not recipe.dpo.reference_free and recipe.dpo.reference == "auto"
