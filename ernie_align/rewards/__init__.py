"""What an answer is paid for: the rewards of a recipe as TRL's callables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ernie_align.recipe.rewards import RewardBlock
from ernie_align.rewards.builtin import scorer_of
from ernie_align.rewards.reward import Reward, missing_columns

__all__ = ["Reward", "build", "missing_columns"]


def build(blocks: Sequence[RewardBlock], *, cache: Path | None = None) -> list[Reward]:
    """The rewards of a recipe, in its order.

    cache: folder in which judges keep their verdicts; without one they are kept nowhere. A reward is called by its
    label, or by its name; the second without a label of its own is name_2.
    Raises RecipeError where a block asks for what is not there: an unset key, a broken schema, a file that fails.
    """
    names: list[str] = []
    for block in blocks:
        names.append(_unused(block.label or block.name.rpartition(":")[2], names))
    return [
        Reward(name, block.weight, scorer_of(block, cache), block.where(""))
        for name, block in zip(names, blocks, strict=True)
    ]


def _unused(name: str, taken: Sequence[str]) -> str:
    numbers = (name if number == 1 else f"{name}_{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in numbers if candidate not in taken)
