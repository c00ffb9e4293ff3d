"""Stage upo: from a recipe to TRL's GRPO config and the UPO trainer, and the checks before any weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.data import media
from ernie_align.data.pairs import PairCollator, PairEncoder
from ernie_align.data.prompts import PromptEncoder
from ernie_align.errors import RecipeError
from ernie_align.rewards import Reward, build_rewards, missing_columns
from ernie_align.rewards.reward import parse_completion
from ernie_align.stages.base import Datasets, ExtraSources, MemoryProfile, Stage, trl_config
from ernie_align.stages.reference import load_reference_model, precomputed_reference
from ernie_align.stages.upo.recipe import UpoRecipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback
    from trl import GRPOConfig

    from ernie_align.data.render import Renderer
    from ernie_align.models.architecture import Architecture
    from ernie_align.models.load import Bundle
    from ernie_align.stages.upo.offline_pairs import OfflinePairs

_WRONG_ANSWER = "I do not know."
_GB = 1e9


class UpoStage(Stage):
    """Rewards, rollouts and preference in one loop, images included."""

    name = "upo"
    recipe = UpoRecipe
    samples_completions = True

    def configure(self, recipe: UpoRecipe, output_dir: str) -> GRPOConfig:
        from trl import GRPOConfig

        block = recipe.upo
        return trl_config(
            GRPOConfig,
            recipe,
            output_dir=output_dir,
            router_aux_loss_coef=0.0,
            # TRL would build its own reference, without the recipe's revision and adapter; the trainer sets kl_weight
            beta=0.0,
            epsilon=block.clip[0],
            epsilon_high=block.clip[1],
            num_generations=block.num_generations,
            max_completion_length=block.max_completion_length,
            temperature=block.temperature,
            top_p=block.top_p,
            use_vllm=recipe.rollout.engine == "vllm",
            scale_rewards="none",  # RolloutSampler normalizes them
        )

    def encoder(self, recipe: UpoRecipe, renderer: Renderer) -> PromptEncoder:
        return PromptEncoder(
            renderer,
            max_length=recipe.data.max_length,
            cut=recipe.data.overlong == "cut",
            domain_column=recipe.upo.domain_column,
            reward_columns={reward.name: reward.columns for reward in build_rewards(recipe.rewards)},
        )

    def extra_sources(self, recipe: UpoRecipe, renderer: Renderer) -> dict[str, ExtraSources]:
        encode = PairEncoder(
            renderer,
            max_length=recipe.data.max_length + recipe.upo.max_completion_length,
            cut=recipe.data.overlong == "cut",
            alternative_fix="remove it from the pairs",
        )
        sources = {"pairs": recipe.upo.pairs_data, "pairs_eval": recipe.upo.pairs_eval}
        return {name: ExtraSources(blocks, encode) for name, blocks in sources.items() if blocks}

    def needs_unsharded_model(self, recipe: UpoRecipe) -> str:
        if _has_second_model(recipe):
            return "the reference is a second model"
        has_pairs = recipe.upo.pairs_data or recipe.upo.pairs_eval
        return "reference log-probs of all pairs are computed before the model is sharded" if has_pairs else ""

    def memory_profile(self, recipe: UpoRecipe) -> MemoryProfile:
        return MemoryProfile(
            min_sequences=2,
            reference_forward=recipe.upo.needs_reference,
            second_model=_has_second_model(recipe),
            adapter_copies=int(recipe.continues_adapter),
            completion_length=recipe.upo.max_completion_length,
            generations=recipe.upo.num_generations,
            batches_per_rollout=_batches_per_rollout(recipe),
        )

    def preflight(self, recipe: UpoRecipe, architecture: Architecture, example: dict[str, Any]) -> list[str]:
        """Call the rewards on two answers and estimate the memory of a rollout. Raises RunError if a reward fails."""
        return [*_try_rewards(recipe, example), _rollout_memory(recipe, architecture)]

    def build_trainer(
        self,
        recipe: UpoRecipe,
        config: GRPOConfig,
        bundle: Bundle,
        datasets: Datasets,
        callbacks: list[TrainerCallback],
    ) -> Trainer:
        from ernie_align.stages.upo.completion_log import CompletionLog
        from ernie_align.stages.upo.trainer import UPOTrainer

        block = recipe.upo
        folder = Path(config.output_dir)
        rewards = build_rewards(recipe.rewards, cache=folder / "judged")
        _check_reward_columns(rewards, datasets.train)
        prompts = config.generation_batch_size // config.num_generations
        if len(datasets.train) < prompts:
            what = f"the data has {len(datasets.train)} prompts, but each rollout needs {prompts} different ones"
            raise RecipeError.at(recipe.data.where("train"), what, fix="add prompts, or make the batch smaller")
        return UPOTrainer(
            model=bundle.model,
            args=config,
            train_dataset=datasets.train,
            eval_dataset=datasets.eval,
            processing_class=bundle.processor,
            callbacks=callbacks,
            row_name=datasets.row_name,
            continues_adapter=recipe.continues_adapter,
            block=block,
            rewards=rewards,
            renderer=datasets.renderer,
            image_processor=bundle.image_processor,
            reference_model=load_reference_model(recipe, bundle) if _has_second_model(recipe) else None,
            pairs=_load_offline_pairs(recipe, bundle, datasets, folder) if datasets.extra else {},
            completion_log=CompletionLog(folder / "completions", block.completions_steps),
        )


def _has_second_model(recipe: UpoRecipe) -> bool:
    return recipe.adapter is None and recipe.upo.needs_reference


def _load_offline_pairs(
    recipe: UpoRecipe, bundle: Bundle, datasets: Datasets, run_dir: Path
) -> dict[str, OfflinePairs]:
    from ernie_align.stages.upo.offline_pairs import OfflinePairs

    pad_token_id, image_processor = bundle.tokenizer.pad_token_id, bundle.image_processor
    collate = PairCollator(pad_token_id, image_processor=image_processor, row_name=datasets.row_name)
    stored = precomputed_reference(recipe, bundle, run_dir, depends_on=f"temperature {recipe.upo.temperature}")
    return {
        name: OfflinePairs(name, rows, collate=collate, stored=stored, seed=recipe.run.seed)
        for name, rows in datasets.extra.items()
    }


def _batches_per_rollout(recipe: UpoRecipe) -> int:
    training = recipe.training
    return training.get("steps_per_generation") or training.get("gradient_accumulation_steps") or 1


def _check_reward_columns(rewards: list[Reward], rows: Dataset) -> None:
    """Raise RecipeError if a reward reads a column that no row has: its name is misspelled."""
    columns = (json.loads(text) for text in rows["columns"])
    present = {name for row in columns for name, value in row.items() if value is not None}
    faults = missing_columns(rewards, {"images", *present})
    if faults:
        raise RecipeError(*faults)


def _try_rewards(recipe: UpoRecipe, example: dict[str, Any]) -> list[str]:
    """Return one line per reward with its scores of the known answer (if the row has one) and of a wrong one."""
    columns = json.loads(example["columns"])
    known = columns.get("answer")
    answers = [] if known is None else [str(known)]
    answers.append(_WRONG_ANSWER)
    prompt = json.loads(example["prompt"])
    is_conversation = isinstance(prompt, list)
    completions = [[parse_completion(text, opened=False)] if is_conversation else text for text in answers]
    arguments = {name: [value] * len(answers) for name, value in columns.items()}
    if example["media"]:
        arguments["images"] = [[media.load_image(image) for image in example["media"]]] * len(answers)
    arguments["completion_ids"] = [[0] * len(text) for text in answers]  # not tokenized: one id per character
    lines = [f"rewards tried on {' and on '.join(map(repr, answers))}:"]
    for block, reward in zip(recipe.rewards, build_rewards(recipe.rewards), strict=True):
        missing = [name for name in reward.columns if name not in arguments or arguments[name][0] is None]
        if block.name == "judge":
            result = "not called: a judge is called in training only"
        elif missing:
            result = f"not called: the first row has no {', '.join(missing)}"
        else:
            scores = reward([prompt] * len(answers), completions, **arguments)
            result = " and ".join("does not apply" if score is None else f"{score:g}" for score in scores)
        lines.append(f"  {reward.name} x {reward.weight:g}: {result}")
    return lines


def _rollout_memory(recipe: UpoRecipe, architecture: Architecture) -> str:
    """Return a line on the memory of sampling besides the weights: keys and values of all tokens, logits of one."""
    completions = (recipe.training.get("per_device_train_batch_size") or 8) * _batches_per_rollout(recipe)
    tokens = recipe.data.max_length + recipe.upo.max_completion_length
    tensors = architecture.tensors
    width = sum(tensor.shape[0] for tensor in tensors if tensor.name.endswith(("k_proj.weight", "v_proj.weight")))
    (vocabulary,) = (tensor.shape[0] for tensor in tensors if tensor.part == "embeddings")
    cache = completions * tokens * width * (2 if recipe.model.dtype == "bfloat16" else 4)
    logits = completions * vocabulary * 4  # sampled in float32
    return (
        f"a rollout samples {completions} completions at once on each device: at most {cache / _GB:.3g} GB of cache "
        f"({tokens} tokens each) and {logits / _GB:.3g} GB of logits, for each copy that sampling makes"
    )
