"""The recipe of stage upo."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from ernie_align.recipe import Block, SourceBlock
from ernie_align.recipe.rewards import RewardBlock, reward_names
from ernie_align.recipe.schema import fault
from ernie_align.stages.base import RESERVED_BY_EVERY_STAGE
from ernie_align.stages.reference import PolicyRecipe
from ernie_align.stages.trl_keys import GRPO_CONFIG, training_model

_COMPLETION_LOG = "set upo.completions_steps: completions are logged in the run directory"
_NO_IMAGES = "drop it: it does not support images"
_FIXED_REFERENCE = "drop it: the reference model does not change during a run"
_RESERVED = {
    **RESERVED_BY_EVERY_STAGE,
    "beta": "set upo.kl_weight (the weight of the KL term) or upo.beta (of the preference term)",
    **dict.fromkeys(("epsilon", "epsilon_high"), "set upo.clip"),
    **{key: f"set upo.{key}" for key in ("num_generations", "max_completion_length", "temperature", "top_p")},
    "reward_weights": "set the weight of each entry under rewards",
    "scale_rewards": "set upo.normalize_rewards",
    "multi_objective_aggregation": "drop it: rewards are weighted, summed and then normalized",
    "use_vllm": "set rollout.engine: vllm",
    "vllm_importance_sampling_cap": "set vllm_importance_sampling_clip_max",
    "use_transformers_continuous_batching": _NO_IMAGES,
    "use_transformers_paged": _NO_IMAGES,
    "transformers_continuous_batching_config": _NO_IMAGES,
    "generation_batch_size": "set steps_per_generation",
    "pad_to_multiple_of": "drop it: rollouts are padded to their longest row",
    "chat_template_kwargs": "set data.thinking",
    "max_tool_calling_iterations": "drop it: a rollout is a single answer, without tools",
    "shuffle_dataset": "drop it: prompts are shuffled by run.seed",
    **dict.fromkeys(("log_completions", "log_multimodal", "num_completions_to_print"), _COMPLETION_LOG),
    **dict.fromkeys(("log_unique_prompts", "log_completions_hub_repo"), _COMPLETION_LOG),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _FIXED_REFERENCE),
    "load_best_model_at_end": "drop it: keep the checkpoints and choose one with ernie-align eval",
}
# TRL's defaults for the sizes of a rollout, so that a recipe is validated without importing TRL.
_DEFAULTS = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1}


class FilterBlock(Block):
    """Zero-advantage groups of completions: they are counted and replaced by groups of other prompts."""

    always_right: bool = Field(True, description="Filter groups in which every completion is right")
    always_wrong: bool = Field(True, description="Filter groups in which no completion is right")
    min_group_std: float = Field(0.0, ge=0, description="Filter groups with at most this standard deviation of rewards")
    by: str | None = Field(
        None, description="Reward that decides: 1 or more is right, 0 or less wrong; default: the first"
    )
    refills: int = Field(2, ge=0, description="How often filtered groups are replaced by groups of other prompts")


class UpoBlock(Block):
    """The objective: policy_weight · L_policy + preference_weight · L_DPO + kl_weight · KL, and its rollouts."""

    pairs: Literal["rollouts", "dataset", "none"] = Field(
        "rollouts",
        description="rollouts: best and worst of each group (online-UPO); dataset: rows of pairs_data (offline-UPO)",
    )
    pairs_data: list[SourceBlock] | None = Field(None, min_length=1, description="Preference rows for pairs: dataset")
    pairs_batch_size: int = Field(
        4, ge=1, description="Pairs of pairs_data per device, added to each batch of rollouts"
    )
    pairs_eval: list[SourceBlock] | None = Field(
        None, min_length=1, description="Held-out preference rows; every evaluation measures their margin"
    )
    pairs_by: str | None = Field(None, description="Reward that ranks a group's completions; default: the weighted sum")
    pairs_margin: float = Field(0.0, ge=0, description="Best and worst are a pair if they differ by more than this")
    policy_weight: float = Field(1.0, ge=0, description="Weight of TRL's GRPO loss")
    preference_weight: float = Field(0.1, ge=0, description="Weight of the preference loss")
    kl_weight: float = Field(0.02, ge=0, description="Weight of the mean KL per token to the reference (k3 estimate)")
    beta: float = Field(
        0.1, gt=0, description="Beta of the preference loss; larger values keep closer to the reference"
    )
    clip: list[float] = Field(
        [0.2, 0.2], min_length=2, max_length=2, description="Policy ratio clip: how far below and above 1"
    )
    num_generations: int = Field(8, ge=2, description="Completions sampled per prompt; together they are a group")
    max_completion_length: int = Field(256, ge=1, description="Maximum tokens of a completion")
    advantage: Literal["group"] = Field("group", description="Reward of a completion minus the mean of its group")
    normalize_rewards: Literal["per_domain", "group", "none"] = Field(
        "per_domain",
        description="Divide advantages by the standard deviation of their domain, their group, or not",
    )
    domain_column: str | None = Field(
        None, description="Row column that holds the domain; default: each source is a domain"
    )
    filter: FilterBlock = Field(default_factory=FilterBlock)
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts")
    top_p: float = Field(1.0, gt=0, le=1, description="Sampling top-p of the rollouts")
    completions_steps: int = Field(50, ge=1, description="Log all completions in the run directory every so many steps")
    warn_kl: float = Field(1.0, gt=0, description="Warn when the mean KL per token exceeds this")
    warn_length: float = Field(2.0, gt=1, description="Warn when completions are this many times as long as at first")

    @property
    def needs_reference(self) -> bool:
        """True if the loss needs reference log-probs of the rollouts."""
        return self.kl_weight > 0 or (self.pairs == "rollouts" and self.preference_weight > 0)

    @model_validator(mode="after")
    def _validate_objective(self) -> UpoBlock:
        if self.pairs == "dataset" and self.pairs_data is None:
            raise fault("pairs", "dataset needs pairs_data, which is not set", fix="list preference rows as pairs_data")
        if self.pairs != "dataset" and self.pairs_data is not None:
            what = f"pairs_data is set, but pairs is {self.pairs}"
            raise fault("pairs_data", what, fix="set pairs: dataset, or drop pairs_data")
        if self.pairs == "none" and "preference_weight" in self.model_fields_set and self.preference_weight > 0:
            what = "preference_weight is set, but pairs is none"
            raise fault("preference_weight", what, fix="set pairs: rollouts or dataset, or drop preference_weight")
        if not (self.policy_weight or (self.preference_weight and self.pairs != "none")):
            what = "policy_weight and preference_weight are both 0: only the KL term is left to train on"
            raise fault("policy_weight", what, fix="give one of them a weight")
        if min(self.clip) <= 0 or self.clip[0] >= 1:
            what = f"invalid value {self.clip}: the clip range must contain ratios on both sides of 1"
            raise fault("clip", what, fix="write [low, high], such as [0.2, 0.2], with 0 < low < 1 and high > 0")
        return self


class RolloutBlock(Block):
    """The engine that samples completions. Options of vLLM are TRL's keys under `training:` (vllm_mode, ...)."""

    engine: Literal["transformers", "vllm"] = Field("transformers", description="vllm must be installed separately")


class UpoRecipe(PolicyRecipe):
    """Unified Preference Optimization: rewards, rollouts and preference in one loop."""

    stage: Literal["upo"]
    rewards: list[RewardBlock] = Field(min_length=1, description="Reward functions; an answer earns their weighted sum")
    upo: UpoBlock = Field(default_factory=UpoBlock)
    rollout: RolloutBlock = Field(default_factory=RolloutBlock)

    @classmethod
    def training_model(cls) -> type[BaseModel]:
        return training_model(GRPO_CONFIG, frozenset(_RESERVED))

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        return _RESERVED

    @model_validator(mode="after")
    def _validate_rollouts(self) -> UpoRecipe:
        if self.data.streaming:
            what = "streaming: true is not supported: rollouts draw prompts by row number"
            raise fault("data", what, fix="set data.streaming: false")
        if self.upo.pairs_eval and not self.data.eval:
            what = "pairs_eval is set, but data.eval is not: both are evaluated together"
            raise fault("upo", what, fix="list prompts under data.eval")
        if self.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            fix = "pip install vllm on a machine with a GPU, or set rollout.engine: transformers"
            raise fault("rollout", "engine: vllm, but vllm is not installed", fix=fix)
        names = reward_names(self.rewards)
        for key, name in (("pairs_by", self.upo.pairs_by), ("filter.by", self.upo.filter.by)):
            if name is not None and name not in names:
                raise fault("upo", f"{key}: no reward is named {name!r}", fix=f"choose from {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _validate_batch_sizes(self) -> UpoRecipe:
        values = {key: self.training.get(key) or default for key, default in _DEFAULTS.items()}
        size, steps = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
        per_generation = self.training.get("steps_per_generation") or steps
        if not all(isinstance(n, int) for n in (size, steps, per_generation)):
            return self  # reported with TRL's keys
        if size * per_generation % self.upo.num_generations:
            rollout = f"{size * per_generation} completions ({size} per batch x {per_generation} batches)"
            what = f"a rollout of {rollout} is not a multiple of upo.num_generations {self.upo.num_generations}"
            fix = "make per_device_train_batch_size x gradient_accumulation_steps a multiple of upo.num_generations"
            raise fault("training", what, fix=fix)
        if self.upo.pairs == "rollouts" and self.upo.preference_weight and size % 2:
            what = f"per_device_train_batch_size {size} is odd"
            raise fault("training", what, why="both sides of a pair must be in the same batch", fix="make it even")
        generations = self.training.get("num_generations_eval") or self.upo.num_generations
        eval_size = values["per_device_eval_batch_size"]
        if self.data.eval and isinstance(generations, int) and isinstance(eval_size, int) and eval_size % generations:
            what = f"per_device_eval_batch_size {eval_size} is not a multiple of {generations} generations per prompt"
            raise fault("training", what, fix="make it a multiple of num_generations_eval (else upo.num_generations)")
        return self
