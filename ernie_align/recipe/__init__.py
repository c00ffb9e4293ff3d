"""Strict, frozen recipes, validated as a whole before anything heavy happens. Imports no torch."""

from ernie_align.recipe.load import differences, load_recipe, to_yaml
from ernie_align.recipe.rewards import RewardBlock
from ernie_align.recipe.schema import (
    ADAPTABLE,
    PARTS,
    AdapterBlock,
    Block,
    DataBlock,
    ModelBlock,
    PartAdapter,
    PartTune,
    Recipe,
    RunBlock,
    SourceBlock,
    TuneBlock,
)

__all__ = [
    "ADAPTABLE",
    "PARTS",
    "AdapterBlock",
    "Block",
    "DataBlock",
    "ModelBlock",
    "PartAdapter",
    "PartTune",
    "Recipe",
    "RewardBlock",
    "RunBlock",
    "SourceBlock",
    "TuneBlock",
    "differences",
    "load_recipe",
    "to_yaml",
]
