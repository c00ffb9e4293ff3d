"""The recipe of the stage upo."""

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

_ONE_TURN = "drop it: a rollout is one answer, without tools"
_OWN_TABLE = "set upo.completions_steps: completions are kept in the run directory"
_OWNED = {
    **RESERVED_BY_EVERY_STAGE,
    "beta": "set upo.kl_weight (the weight of the KL term) or upo.beta (of the preference term)",
    "epsilon": "set upo.clip",
    "epsilon_high": "set upo.clip",
    "num_generations": "set upo.num_generations",
    "max_completion_length": "set upo.max_completion_length",
    "temperature": "set upo.temperature",
    "top_p": "set upo.top_p",
    "reward_weights": "set the weight of each entry under rewards",
    "scale_rewards": "set upo.normalize_rewards",
    "multi_objective_aggregation": "drop it: rewards are weighted, summed and then normalized",
    "use_vllm": "set rollout.engine: vllm",
    "vllm_importance_sampling_cap": "set vllm_importance_sampling_clip_max",
    "use_transformers_continuous_batching": "drop it: it takes no images",
    "use_transformers_paged": "drop it: it takes no images",
    "transformers_continuous_batching_config": "drop it: it takes no images",
    "generation_batch_size": "set steps_per_generation",
    "pad_to_multiple_of": "drop it: rollouts are padded to their longest row",
    "chat_template_kwargs": "set data.thinking",
    "max_tool_calling_iterations": _ONE_TURN,
    "shuffle_dataset": "drop it: prompts are shuffled by run.seed",
    "log_completions": _OWN_TABLE,
    "log_multimodal": _OWN_TABLE,
    "num_completions_to_print": _OWN_TABLE,
    "log_unique_prompts": _OWN_TABLE,
    "log_completions_hub_repo": _OWN_TABLE,
    "sync_ref_model": "drop it: the reference stays what it was when the run began",
    "ref_model_mixup_alpha": "drop it: the reference stays what it was when the run began",
    "ref_model_sync_steps": "drop it: the reference stays what it was when the run began",
    "load_best_model_at_end": "drop it: keep the checkpoints and choose one with ernie-align eval",
}
# TRL's defaults of what a rollout is made of, for judging a recipe without importing it.
_DEFAULTS = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
}


class FilterBlock(Block):
    """Which groups of completions teach nothing: they are counted, left out, and others are drawn in their place."""

    always_right: bool = Field(True, description="Leave out groups in which every completion is right")
    always_wrong: bool = Field(True, description="Leave out groups in which none is")
    min_group_std: float = Field(0.0, ge=0, description="Leave out groups whose rewards deviate by no more than this")
    by: str | None = Field(None, description="The reward that says what is right (1 or more; 0 or less is wrong)")
    refills: int = Field(2, ge=0, description="Times that a batch is filled up with other prompts, at most")


class UpoBlock(Block):
    """The objective: policy_weight · L_policy + preference_weight · L_DPO + kl_weight · KL, and its rollouts."""

    pairs: Literal["rollouts", "dataset", "none"] = Field(
        "rollouts",
        description="rollouts: best and worst of each group (online-UPO); dataset: rows of pairs_data (offline-UPO)",
    )
    pairs_data: list[SourceBlock] | None = Field(None, min_length=1, description="Preference rows, for pairs: dataset")
    pairs_batch_size: int = Field(4, ge=1, description="Pairs of pairs_data per device beside each batch of rollouts")
    pairs_eval: list[SourceBlock] | None = Field(
        None, min_length=1, description="Held-out preference rows whose margin each evaluation measures"
    )
    pairs_by: str | None = Field(None, description="The reward that ranks a group; otherwise the weighted sum")
    pairs_margin: float = Field(0.0, ge=0, description="Best and worst make a pair if they differ by more than this")
    policy_weight: float = Field(1.0, ge=0, description="Of TRL's GRPO loss")
    preference_weight: float = Field(0.1, ge=0, description="Of the pair loss")
    kl_weight: float = Field(0.02, ge=0, description="Of the mean KL of a token from the reference, k3 estimate")
    beta: float = Field(0.1, gt=0, description="Of the preference term: how strongly it holds to the reference")
    clip: list[float] = Field([0.2, 0.2], min_length=2, max_length=2, description="How far below and above 1 a ratio")
    num_generations: int = Field(8, ge=2, description="Completions of each prompt: one group")
    max_completion_length: int = Field(256, ge=1, description="Tokens")
    advantage: Literal["group"] = Field("group", description="What a completion earned above the mean of its group")
    normalize_rewards: Literal["per_domain", "group", "none"] = Field(
        "per_domain", description="Whose standard deviation rewards are divided by"
    )
    domain_column: str | None = Field(
        None, description="Row column that names the domain; otherwise each source is one"
    )
    filter: FilterBlock = Field(default_factory=FilterBlock)
    temperature: float = Field(1.0, gt=0, description="Of the rollouts")
    top_p: float = Field(1.0, gt=0, le=1, description="Of the rollouts: share of probability that is drawn from")
    completions_steps: int = Field(50, ge=1, description="Steps between two tables of completions in the run directory")
    warn_kl: float = Field(1.0, gt=0, description="Warn when the mean KL of a token is over this")
    warn_length: float = Field(2.0, gt=1, description="Warn when completions are this many times as long as at first")

    @property
    def needs_reference(self) -> bool:
        """Whether rollouts are judged by the reference too."""
        return self.kl_weight > 0 or (self.pairs == "rollouts" and self.preference_weight > 0)

    @model_validator(mode="after")
    def _pairs_have_an_origin(self) -> UpoBlock:
        if self.pairs == "dataset" and self.pairs_data is None:
            raise fault("pairs", "dataset, and none is named", fix="name sources of preference rows as pairs_data")
        if self.pairs != "dataset" and self.pairs_data is not None:
            raise fault("pairs_data", f"given, but pairs is {self.pairs}", fix="set pairs: dataset, or drop pairs_data")
        given = "preference_weight" in self.model_fields_set
        if self.pairs == "none" and given and self.preference_weight > 0:
            raise fault("preference_weight", "without pairs", fix="set pairs: rollouts or dataset, or drop the weight")
        if not (self.policy_weight or (self.preference_weight and self.pairs != "none")):
            what = "policy and preference both weigh nothing: only the KL term is left, which is least at the start"
            raise fault("policy_weight", what, fix="give one of them a weight")
        if min(self.clip) <= 0 or self.clip[0] >= 1:
            raise fault("clip", f"{self.clip} holds no ratio near 1", fix="write [low, high], such as [0.2, 0.2]")
        return self


class RolloutBlock(Block):
    """What draws the completions. vLLM's own options stand under `training:`, in TRL's words (vllm_mode, ...)."""

    engine: Literal["transformers", "vllm"] = Field("transformers", description="vllm has to be installed")


class UpoRecipe(PolicyRecipe):
    """Unified Preference Optimization: rewards, rollouts and preference in one loop."""

    stage: Literal["upo"]
    rewards: list[RewardBlock] = Field(min_length=1, description="What an answer is paid for: their weighted sum")
    upo: UpoBlock = Field(default_factory=UpoBlock)
    rollout: RolloutBlock = Field(default_factory=RolloutBlock)

    @classmethod
    def training_model(cls) -> type[BaseModel]:
        """See Recipe."""
        return training_model(GRPO_CONFIG, frozenset(_OWNED))

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        """See Recipe."""
        return _OWNED

    @model_validator(mode="after")
    def _rollouts_can_be_drawn(self) -> UpoRecipe:
        if self.data.streaming:
            raise fault("data", "streaming: rollouts draw prompts by number", fix="set data.streaming: false")
        if self.upo.pairs_eval and not self.data.eval:
            raise fault(
                "upo", "pairs_eval without data.eval", fix="name prompts under data.eval: both are measured then"
            )
        if self.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            fix = "pip install vllm on a machine with a GPU, or set rollout.engine: transformers"
            raise fault("rollout", "engine: vllm, which is not installed", fix=fix)
        return self

    @model_validator(mode="after")
    def _batches_hold_groups(self) -> UpoRecipe:
        given = {key: self.training.get(key) or default for key, default in _DEFAULTS.items()}
        size, steps = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
        per_generation = self.training.get("steps_per_generation") or steps
        if not all(isinstance(n, int) for n in (size, steps, per_generation)):
            return self  # judged as TRL's keys
        if size * per_generation % self.upo.num_generations:
            what = f"{size} rows a batch x {per_generation} batches a rollout hold no whole groups of "
            fix = "make per_device_train_batch_size x gradient_accumulation_steps a multiple of upo.num_generations"
            raise fault("training", what + str(self.upo.num_generations), fix=fix)
        if self.upo.pairs == "rollouts" and self.upo.preference_weight and size % 2:
            what = f"per_device_train_batch_size {size} is odd"
            raise fault("training", what, why="both sides of a pair stand in one batch", fix="make it even")
        asked = self.training.get("num_generations_eval") or self.upo.num_generations
        evaluated = given["per_device_eval_batch_size"]
        if self.data.eval and isinstance(asked, int) and isinstance(evaluated, int) and evaluated % asked:
            what = f"per_device_eval_batch_size {evaluated} holds no whole groups of {asked}"
            raise fault("training", what, fix="make it a multiple of num_generations_eval (else upo.num_generations)")
        return self

    @model_validator(mode="after")
    def _named_rewards_exist(self) -> UpoRecipe:
        names = reward_names(self.rewards)
        for key, name in (("pairs_by", self.upo.pairs_by), ("filter", self.upo.filter.by)):
            if name is not None and name not in names:
                raise fault("upo", f"{key}: no reward is called {name}", fix=f"choose from {', '.join(names)}")
        return self
