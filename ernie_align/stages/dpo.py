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
from ernie_align.stages.reference import PolicyRecipe, load_reference_model, precomputed_reference, scope, wrap
from ernie_align.stages.trl_keys import DPO_CONFIG, training_model

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback
    from trl import DPOConfig

    from ernie_align.data.render import Renderer
    from ernie_align.models.load import Bundle

# Keys of TRL's config that say what the loss is: written under dpo:, under TRL's own names.
_TRL_LOSS_KEYS = (
    "beta",
    "label_smoothing",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
)
_OWN_LOSSES = ("simpo", "dpop")
_WITHOUT_REFERENCE = frozenset({"simpo", "sft"})
_NORMALIZED_ALREADY = frozenset({"simpo", "ipo", "sigmoid_norm", "sft"})

_OWNED = {
    **RESERVED_BY_EVERY_STAGE,
    **{key: f"set dpo.{key}" for key in (*_TRL_LOSS_KEYS, "loss_type", "loss_weights")},
    "precompute_ref_log_probs": "set dpo.reference: precomputed",
    "padding_free": "drop it: rows without padding would see one another in this model",
    "sync_ref_model": "drop it: the reference stays what it was when the run began",
    "ref_model_mixup_alpha": "drop it: the reference stays what it was when the run began",
    "ref_model_sync_steps": "drop it: the reference stays what it was when the run began",
    # transformers reloads the best weights with strict=False, which finds 3 of 98 tensors of a VL model
    "load_best_model_at_end": "drop it: keep the checkpoints and choose one with ernie-align eval",
}

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "simpo",
    "dpop",
]


class DpoBlock(Block):
    """The preference loss, its reference, and which pairs it learns from."""

    beta: float = Field(0.1, gt=0, description="How strongly the policy is held to the reference; for ipo its τ")
    loss_type: list[LossType] = Field(["sigmoid"], min_length=1, description="TRL's loss types, and simpo and dpop")
    loss_weights: list[float] | None = Field(None, description="One for each loss type; 1.0 each if left out")
    length_normalize: bool = Field(
        False, description="Scale each log-probability by mean length / own length, as the official toolkit does"
    )
    sft_weight: float = Field(0.0, ge=0, description="Weight of the chosen answers' mean negative log-likelihood")
    simpo_gamma: float = Field(0.5, description="Margin of simpo")
    dpop_lambda: float = Field(50.0, ge=0, description="Weight of dpop's penalty; 50 in its paper")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of pairs taken to be the wrong way round")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="LD-DPO: weight of the tokens beyond the shorter answer's length"
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="f-DPO: what the distance from the reference is"
    )
    f_alpha_divergence_coef: float = Field(0.5, description="Of alpha_divergence")
    use_weighting: bool = Field(False, description="WPO: weigh pairs by how likely the policy finds them")
    discopop_tau: float = Field(0.05, gt=0, description="Temperature of discopop")
    reference: Literal["auto", "precomputed"] = Field(
        "auto",
        description="auto: adapters off, the adapter's first state, or a frozen model; precomputed: asked once, kept",
    )
    shared_prompt: bool = Field(
        False, description="Compute each prompt once, in one row with both answers: the same loss for less work"
    )
    pairs: Literal["best_worst", "adjacent", "all"] = Field(
        "best_worst", description="Which pairs a row of more than two ranked answers gives"
    )
    bad_pairs: Literal["stop", "drop"] = Field(
        "stop", description="Pairs with equal sides, an empty one, or an image in only one: stop the run, or drop them"
    )

    @property
    def reference_free(self) -> bool:
        """No loss asks for a reference."""
        return set(self.loss_type) <= _WITHOUT_REFERENCE

    @property
    def weights(self) -> list[float]:
        """One for each loss type."""
        return self.loss_weights or [1.0] * len(self.loss_type)

    @model_validator(mode="after")
    def _losses_go_together(self) -> DpoBlock:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            what = f"{len(self.loss_weights)} weights for {len(self.loss_type)} loss types"
            raise fault("loss_weights", what, fix="give one for each, in their order")
        normalized = [name for name in self.loss_type if name in _NORMALIZED_ALREADY]
        if self.length_normalize and normalized:
            fix = f"set it to false, or drop {', '.join(normalized)} (for sft: set dpo.sft_weight)"
            raise fault("length_normalize", f"{', '.join(normalized)} counts per token already", fix=fix)
        if self.length_normalize and (self.use_weighting or self.ld_alpha is not None):
            raise fault(
                "length_normalize", "with use_weighting or ld_alpha, which weigh tokens", fix="choose one of them"
            )
        own = [name for name in self.loss_type if name in _OWN_LOSSES]
        if own and (self.f_divergence_type != "reverse_kl" or self.use_weighting or self.ld_alpha is not None):
            what = f"{', '.join(own)} with f_divergence_type, use_weighting or ld_alpha"
            raise fault("loss_type", what, fix="leave these at their defaults: they are defined for TRL's losses alone")
        return self


class DpoRecipe(PolicyRecipe):
    """Preference training of adapters (`adapter:`), or of the parts in `tune.scopes`."""

    stage: Literal["dpo"]
    dpo: DpoBlock = Field(default_factory=DpoBlock)

    @classmethod
    def training_model(cls) -> type[BaseModel]:
        """See Recipe."""
        return training_model(DPO_CONFIG, frozenset(_OWNED))

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        """See Recipe."""
        return _OWNED

    @model_validator(mode="after")
    def _a_prompt_is_shared_under_a_mask(self) -> DpoRecipe:
        if self.dpo.shared_prompt and self.model.attention not in ("sdpa", "eager"):
            raise fault(
                "dpo",
                f"shared_prompt with attention {self.model.attention}",
                why="chosen and rejected share a row under a mask, which flash attention does not take",
                fix="set model.attention: sdpa, or dpo.shared_prompt: false",
            )
        return self

    @model_validator(mode="after")
    def _rows_are_padded_to_a_multiple(self) -> DpoRecipe:
        validate_padding(self.training)
        return self

    @model_validator(mode="after")
    def _kept_reference_is_of_rows(self) -> DpoRecipe:
        if self.dpo.reference == "precomputed" and self.data.streaming:
            raise fault(
                "dpo", "reference: precomputed of a stream", fix="set data.streaming or dpo.reference otherwise"
            )
        return self


def _encode(recipe: DpoRecipe, renderer: Renderer) -> PairEncoder:
    return PairEncoder(
        renderer,
        max_length=recipe.data.max_length,
        cut=recipe.data.overlong == "cut",
        pairing=recipe.dpo.pairs,
        drop_bad_pairs=recipe.dpo.bad_pairs == "drop",
    )


def _configure(recipe: DpoRecipe, output_dir: str) -> DPOConfig:
    from trl import DPOConfig

    block = recipe.dpo
    upstream = [pair for pair in zip(block.loss_type, block.weights, strict=True) if pair[0] not in _OWN_LOSSES]
    return trl_config(
        DPOConfig,
        recipe,
        output_dir=output_dir,
        router_aux_loss_coef=0.0,
        max_length=None,  # pairs are already judged by length
        loss_type=[name for name, _ in upstream],
        loss_weights=[weight for _, weight in upstream],
        # TRL builds a reference of its own for full fine-tuning unless it expects one in the batch
        precompute_ref_log_probs=recipe.adapter is None and not _has_own_reference(recipe),
        **{key: getattr(block, key) for key in _TRL_LOSS_KEYS},
    )


def _has_own_reference(recipe: DpoRecipe) -> bool:
    """Full fine-tuning against a second, frozen model."""
    return recipe.adapter is None and not recipe.dpo.reference_free and recipe.dpo.reference == "auto"


def _beforehand(recipe: DpoRecipe) -> str:
    """See Stage."""
    if _has_own_reference(recipe):
        return "the reference is a second model"
    asked = recipe.dpo.reference == "precomputed" and not recipe.dpo.reference_free
    return "reference: precomputed is asked before the model is sharded" if asked else ""


def _own_losses(block: DpoBlock) -> list[tuple[Callable[..., Any], float]]:
    from ernie_align import losses

    def simpo(policy, reference, lengths):
        return losses.simpo(*policy, *lengths, beta=block.beta, gamma=block.simpo_gamma)

    def dpop(policy, reference, lengths):
        ratios = (mine - theirs for mine, theirs in zip(policy, reference, strict=True))
        return losses.dpop(*ratios, beta=block.beta, lambda_=block.dpop_lambda)

    known = {"simpo": simpo, "dpop": dpop}
    return [(known[name], weight) for name, weight in zip(block.loss_type, block.weights, strict=True) if name in known]


def _build_trainer(
    recipe: DpoRecipe,
    config: DPOConfig,
    bundle: Bundle,
    batches: Datasets,
    callbacks: list[TrainerCallback],
) -> Trainer:
    from ernie_align.stages.dpo_trainer import PreferenceTrainer

    block = recipe.dpo
    collator = SharedPromptCollator if block.shared_prompt else PairCollator
    stored = None
    if block.reference == "precomputed" and not block.reference_free:
        stored = precomputed_reference(recipe, bundle, Path(config.output_dir), depends_on=f"ld_alpha {block.ld_alpha}")
    return PreferenceTrainer(
        model=bundle.model,
        ref_model=load_reference_model(recipe, bundle) if _has_own_reference(recipe) else None,
        args=config,
        data_collator=collator(
            bundle.tokenizer.pad_token_id,
            image_processor=bundle.image_processor,
            row_name=batches.row_name,
            pad_to_multiple_of=config.pad_to_multiple_of,
        ),
        train_dataset=batches.train,
        eval_dataset=batches.eval,
        processing_class=bundle.processor,
        callbacks=callbacks,
        row_name=batches.row_name,
        continues_adapter=recipe.continues_adapter,
        reference_free=block.reference_free,
        length_normalize=block.length_normalize,
        sft_weight=block.sft_weight,
        extra_losses=_own_losses(block),
        stored=stored,
    )


def _memory_profile(recipe: DpoRecipe) -> MemoryProfile:
    asks_reference = not recipe.dpo.reference_free and recipe.dpo.reference == "auto"
    sequences = 1 if recipe.dpo.shared_prompt else 2
    return MemoryProfile(
        sequences_per_row=sequences,
        min_sequences=sequences,
        shared_prompt=recipe.dpo.shared_prompt,
        reference_forward=asks_reference,
        reference_in_step=asks_reference,
        second_model=asks_reference and recipe.adapter is None,
        adapter_copies=int(recipe.continues_adapter),
    )


DPO = Stage(
    name="dpo",
    help="Preference training on chosen and rejected answers, images included.",
    recipe=DpoRecipe,
    scope=scope,
    wrap=wrap,
    configure=_configure,
    encode=_encode,
    build_trainer=_build_trainer,
    beforehand=_beforehand,
    memory_profile=_memory_profile,
)
