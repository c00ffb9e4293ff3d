"""Score completions: the rewards of a recipe as callables with TRL's signature."""

from ernie_align.rewards.builtin import build_rewards
from ernie_align.rewards.reward import Reward, missing_columns

__all__ = ["Reward", "build_rewards", "missing_columns"]
