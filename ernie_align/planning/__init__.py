"""Plan a recipe's memory and time from the model's config.json, without torch."""

from ernie_align.planning.plan import Plan, plan

__all__ = ["Plan", "plan"]
