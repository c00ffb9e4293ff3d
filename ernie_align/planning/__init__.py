"""What a recipe needs, in bytes and hours, before anything is rented: from its config.json, without torch."""

from ernie_align.planning.plan import Plan, plan

__all__ = ["Plan", "plan"]
