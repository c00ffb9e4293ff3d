"""What an answer is paid for: the rewards of a recipe as TRL's callables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ernie_align.recipe.rewards import RewardBlock, reward_names
from ernie_align.rewards.builtin import scorer_of
from ernie_align.rewards.reward import Reward, missing_columns

__all__ = ["Reward", "build_rewards", "missing_columns"]


def build_rewards(blocks: Sequence[RewardBlock], *, cache: Path | None = None) -> list[Reward]:
    """The rewards of a recipe, in its order.

    cache: folder in which judges keep their verdicts; without one they are kept nowhere. A reward is called by its
    label, or by its name; the second without a label of its own is name_2.
    Raises RecipeError where a block asks for what is not there: an unset key, a broken schema, a file that fails.
    """
    return [
        Reward(name, block.weight, scorer_of(block, cache), block.where(""))
        for name, block in zip(reward_names(blocks), blocks, strict=True)
    ]
