"""Score completions: the rewards of a recipe as callables with TRL's signature."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ernie_align.recipe.rewards import RewardBlock, reward_names
from ernie_align.rewards.builtin import build_scorer
from ernie_align.rewards.reward import Reward, missing_columns

__all__ = ["Reward", "build_rewards", "missing_columns"]


def build_rewards(blocks: Sequence[RewardBlock], *, cache: Path | None = None) -> list[Reward]:
    """Build the rewards of a recipe, in its order.

    cache: folder in which judges store their scores; None stores nothing. A reward is named by its label, or by its
    name; the second one without a label is name_2.
    Raises RecipeError if a block names something that is missing or broken: an environment variable, a package, a JSON
    schema, a file that fails.
    """
    return [
        Reward(name, block.weight, build_scorer(block, cache), block.where(""))
        for name, block in zip(reward_names(blocks), blocks, strict=True)
    ]
