"""The stage upo: how its recipe becomes TRL's GRPOTrainer with a preference loss beside the policy loss."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_align.data.pairs import PairCollator, PairEncoder
from ernie_align.data.prompts import PromptEncoder
from ernie_align.errors import RecipeError
from ernie_align.rewards import Reward, build_rewards, missing_columns
from ernie_align.stages.base import Datasets, ExtraSources, MemoryProfile, Stage, trl_config
from ernie_align.stages.reference import load_reference_model, precomputed_reference, scope, wrap
from ernie_align.stages.upo.preflight import tried
from ernie_align.stages.upo.recipe import UpoRecipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback
    from trl import GRPOConfig

    from ernie_align.data.render import Renderer
    from ernie_align.models.load import Bundle


def _configure(recipe: UpoRecipe, output_dir: str) -> GRPOConfig:
    from trl import GRPOConfig

    block = recipe.upo
    return trl_config(
        GRPOConfig,
        recipe,
        output_dir=output_dir,
        router_aux_loss_coef=0.0,
        # TRL would build a reference of its own, without the recipe's revision and adapter; kl_weight is set later
        beta=0.0,
        epsilon=block.clip[0],
        epsilon_high=block.clip[1],
        num_generations=block.num_generations,
        max_completion_length=block.max_completion_length,
        temperature=block.temperature,
        top_p=block.top_p,
        use_vllm=recipe.rollout.engine == "vllm",
        scale_rewards="none",  # rewards are normalized here
    )


def _encode(recipe: UpoRecipe, renderer: Renderer) -> PromptEncoder:
    return PromptEncoder(
        renderer,
        max_length=recipe.data.max_length,
        cut=recipe.data.overlong == "cut",
        domain_column=recipe.upo.domain_column,
        reward_columns={reward.name: reward.columns for reward in build_rewards(recipe.rewards)},
    )


def _beside(recipe: UpoRecipe, renderer: Renderer) -> dict[str, ExtraSources]:
    longest = recipe.data.max_length + recipe.upo.max_completion_length
    alternative_fix = "take it out of the pairs"
    encode = PairEncoder(
        renderer, max_length=longest, cut=recipe.data.overlong == "cut", alternative_fix=alternative_fix
    )
    sources = {"pairs": recipe.upo.pairs_data, "pairs_eval": recipe.upo.pairs_eval}
    return {name: ExtraSources(blocks, encode) for name, blocks in sources.items() if blocks}


def _needs_second_model(recipe: UpoRecipe) -> bool:
    return recipe.adapter is None and recipe.upo.needs_reference


def _beforehand(recipe: UpoRecipe) -> str:
    """See Stage."""
    if _needs_second_model(recipe):
        return "the reference is a second model"
    asked = recipe.upo.pairs_data or recipe.upo.pairs_eval
    return "the reference is asked about whole sets of pairs before the model is sharded" if asked else ""


def _build_trainer(
    recipe: UpoRecipe,
    config: GRPOConfig,
    bundle: Bundle,
    batches: Datasets,
    callbacks: list[TrainerCallback],
) -> Trainer:
    from ernie_align.stages.upo.completion_log import CompletionTables
    from ernie_align.stages.upo.offline_pairs import OfflinePairs
    from ernie_align.stages.upo.trainer import UPOTrainer

    block = recipe.upo
    folder = Path(config.output_dir)
    pairs = partial(
        OfflinePairs,
        collate=PairCollator(
            bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor, row_name=batches.row_name
        ),
        stored=precomputed_reference(recipe, bundle, folder, depends_on=f"temperature {block.temperature}"),
        seed=recipe.run.seed,
    )
    rewards = build_rewards(recipe.rewards, cache=folder / "judged")
    _refuse_unread_columns(rewards, batches.train)
    prompts = config.generation_batch_size // config.num_generations
    if len(batches.train) < prompts:
        what = f"{len(batches.train)} prompts, and each rollout asks {prompts} different ones"
        raise RecipeError.at(recipe.data.where("train"), what, fix="give more prompts, or make the batch smaller")
    return UPOTrainer(
        model=bundle.model,
        args=config,
        train_dataset=batches.train,
        eval_dataset=batches.eval,
        processing_class=bundle.processor,
        callbacks=callbacks,
        block=block,
        rewards=rewards,
        renderer=batches.renderer,
        image_processor=bundle.image_processor,
        row_name=batches.row_name,
        continues_adapter=recipe.continues_adapter,
        frozen=load_reference_model(recipe, bundle) if _needs_second_model(recipe) else None,
        pairs={name: pairs(name, rows) for name, rows in batches.beside.items()},
        tables=CompletionTables(folder / "completions", block.completions_steps),
    )


def _refuse_unread_columns(rewards: list[Reward], rows: Dataset) -> None:
    """A column that a reward reads and no row has is a slip of the pen. Raises RecipeError."""
    columns = (json.loads(text) for text in rows["columns"])
    present = {name for row in columns for name, value in row.items() if value is not None}
    faults = missing_columns(rewards, {"images", *present})
    if faults:
        raise RecipeError(*faults)


def _memory_profile(recipe: UpoRecipe) -> MemoryProfile:
    training = recipe.training
    return MemoryProfile(
        min_sequences=2,
        reference_forward=recipe.upo.needs_reference,
        second_model=_needs_second_model(recipe),
        adapter_copies=int(recipe.continues_adapter),
        completion_length=recipe.upo.max_completion_length,
        generations=recipe.upo.num_generations,
        batches_per_rollout=training.get("steps_per_generation") or training.get("gradient_accumulation_steps", 1),
    )


UPO = Stage(
    name="upo",
    help="Rewards, rollouts and preference in one loop, images included.",
    recipe=UpoRecipe,
    scope=scope,
    wrap=wrap,
    configure=_configure,
    encode=_encode,
    build_trainer=_build_trainer,
    beside=_beside,
    tried=tried,
    beforehand=_beforehand,
    memory_profile=_memory_profile,
)
