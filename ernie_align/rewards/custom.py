"""Rewards from the user's own files: the one place where a recipe names code."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ernie_align.errors import RecipeError
from ernie_align.recipe.rewards import CustomReward, FunctionSignature
from ernie_align.rewards.reward import Scorer


def custom(block: CustomReward) -> Scorer:
    """The function that the block names, called as TRL calls it, with the block's args over the row's columns.

    Raises RecipeError at the block's place if its file cannot be run.
    """
    function, line = _function(block), FunctionSignature.read(block.path, block.function).line

    def score(prompts: Any, completions: Any, **columns: Any) -> Any:
        return function(prompts=prompts, completions=completions, **{**columns, **block.args})

    return Scorer(score, block.columns, f"{block.path.resolve()}:{line}")


def _function(block: CustomReward) -> Callable:
    path = block.path.resolve()
    try:
        return getattr(_module(path), block.function)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        what = f"{block.path} cannot be imported: {type(error).__name__}: {error}"
        why = f"{path}:{lines[-1]}" if lines else ""
        raise RecipeError.at(block.where("name"), what, why=why, fix="mend the file") from error


def _module(path: Path) -> ModuleType:
    """The file as a module of its own name; several functions of one file share it."""
    name = "ernie_align_recipe_" + re.sub(r"\W", "_", str(path.with_suffix("")))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses and pickle look it up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
