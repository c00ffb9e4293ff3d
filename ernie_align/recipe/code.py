"""A function that a recipe names: what it takes, read off its file without running it."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ernie_align.recipe.document import file_text
from ernie_align.recipe.schema import fault

# What TRL hands to every reward function beside the columns of the rows.
FROM_TRAINER = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)


@dataclass(frozen=True)
class Function:
    """line: where it begins, from 1; required, optional: its parameters without and with a default, minus what TRL
    gives; takes_any: it has **kwargs.
    """

    line: int
    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_any: bool
    is_async: bool

    @classmethod
    def read(cls, path: Path, name: str) -> Function:
        """The function `name` at the top level of the file. Raises a fault of the recipe if there is none."""
        try:
            tree = ast.parse(file_text(path), str(path))
        except OSError as error:
            what = f"{path} cannot be read: {error.strerror}"
            raise fault("", what, fix="name a file; paths start at the working directory") from None
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # of nesting: either of the last two
            raise fault("", f"{path} is no Python: {error}", fix="mend the file") from None
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if name not in functions:
            fix = did_you_mean(name, list(functions)) if functions else "define it at the file's top level"
            raise fault("", f"{path} has no function {name}", fix=fix)
        return cls._of(functions[name])

    @classmethod
    def _of(cls, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        bare = len(names) - len(node.args.defaults)
        keywords = list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
        required = [*names[:bare], *(key.arg for key, default in keywords if default is None)]
        optional = [*names[bare:], *(key.arg for key, default in keywords if default is not None)]
        return cls(
            line=node.lineno,
            required=tuple(name for name in required if name not in FROM_TRAINER),
            optional=tuple(name for name in optional if name not in FROM_TRAINER),
            takes_any=node.args.kwarg is not None,
            is_async=isinstance(node, ast.AsyncFunctionDef),
        )


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """The next move after a wrong name: the nearest right one, or all of them."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(choices)}"
