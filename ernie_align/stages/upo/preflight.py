"""What a upo recipe comes to before any weight is loaded: rewards tried on two answers, and the memory of a rollout."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ernie_align.data import media
from ernie_align.rewards import build_rewards
from ernie_align.rewards.completion import parse_completion

if TYPE_CHECKING:
    from ernie_align.models.architecture import Architecture
    from ernie_align.stages.upo.recipe import UpoRecipe

_WRONG = "I do not know."
_GB = 1e9


def tried(recipe: UpoRecipe, architecture: Architecture, example: dict[str, Any]) -> list[str]:
    """Lines for the user. example: of PromptEncoder. Raises RunError where a reward fails."""
    return [*_rewards(recipe, example), _memory(recipe, architecture)]


def _rewards(recipe: UpoRecipe, example: dict[str, Any]) -> list[str]:
    columns = json.loads(example["columns"])
    known = columns.get("answer")
    answers = [str(known)] if known is not None else []
    answers.append(_WRONG)
    conversation = isinstance(json.loads(example["prompt"]), list)
    completions = [[parse_completion(text, opened=False)] if conversation else text for text in answers]
    given = {name: [value] * len(answers) for name, value in columns.items()}
    if example["media"]:
        given["images"] = [[media.load_image(image) for image in example["media"]]] * len(answers)
    given["completion_ids"] = [[0] * len(text) for text in answers]  # no token is known: one per character
    lines = [f"rewards tried on {' and on '.join(map(repr, answers))}:"]
    for block, reward in zip(recipe.rewards, build_rewards(recipe.rewards), strict=True):
        if block.name == "judge":
            lines.append(f"  {reward.name} x {reward.weight:g}: a judge is asked in training only")
            continue
        missing = [name for name in reward.columns if name not in given or given[name][0] is None]
        if missing:
            lines.append(f"  {reward.name} x {reward.weight:g}: the first row has no {', '.join(missing)}")
            continue
        prompts = [json.loads(example["prompt"])] * len(answers)
        scores = reward(prompts, completions, **given)
        shown = " and ".join("does not apply" if score is None else f"{score:g}" for score in scores)
        lines.append(f"  {reward.name} x {reward.weight:g}: {shown}")
    return lines


def _memory(recipe: UpoRecipe, architecture: Architecture) -> str:
    """Of what drawing holds beside the weights: keys and values of every token, and one row of logits each."""
    size = recipe.training.get("per_device_train_batch_size") or 8
    steps = recipe.training.get("steps_per_generation") or recipe.training.get("gradient_accumulation_steps") or 1
    tokens = recipe.data.max_length + recipe.upo.max_completion_length
    kept = [tensor for tensor in architecture.tensors if tensor.name.endswith(("k_proj.weight", "v_proj.weight"))]
    width = sum(tensor.shape[0] for tensor in kept)
    (vocabulary,) = (tensor.shape[0] for tensor in architecture.tensors if tensor.part == "embeddings")
    cache = size * steps * tokens * width * (2 if recipe.model.dtype == "bfloat16" else 4)
    logits = size * steps * vocabulary * 4  # sampling is done in float32
    return (
        f"a rollout draws {size * steps} completions at once on each device: at most {cache / _GB:.3g} GB of cache "
        f"({tokens} tokens each) and {logits / _GB:.3g} GB of logits, for each copy that sampling makes"
    )
