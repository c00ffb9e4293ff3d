"""The house rules, read off the source: imports go down only, third parties keep to their doors, imports do nothing."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import ROOT

PACKAGE = ROOT / "ernie_align"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "redact": -2,
    "errors": -1,  # every room may raise
    "recipe": 0,
    "losses": 0,
    "models": 1,
    "data": 1,
    "rewards": 1,
    "tiny": 1,
    "stages": 2,
    "evaluation": 2,
    "doctor": 2,
    "runs": 3,
    "exporting": 3,
    "planning": 3,
    "report": 3,
    "cli": 4,
    "__main__": 5,
    "__init__": 4,
}
# third party -> where it may be imported
DOORS = {
    "trl": ("stages",),
    "peft": ("models", "exporting"),
    "pydantic": ("recipe", "stages"),
    "pydantic_core": ("recipe", "stages"),
    "yaml": ("recipe",),
    "typer": ("cli",),
    "rich": ("cli", "report"),
    "matplotlib": ("report",),
    "jinja2": ("report", "exporting"),
    "lm_eval": ("evaluation",),
    "math_verify": ("rewards",),
    "jsonschema": ("rewards",),
    "openai": ("rewards",),
    "pebble": ("rewards",),
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    here = room(path)
    for name in imports(path):
        if not name.startswith("ernie_align."):
            continue
        there = name.split(".")[1]
        if there in FLOORS and there != here:
            assert FLOORS[there] < FLOORS[here], f"{path} imports {name}: floor {FLOORS[there]} from {FLOORS[here]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_parties_keep_to_their_doors(path):
    for name in imports(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or room(path) in doors, f"{path} imports {name}, which is only for {', '.join(doors)}"


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} <= FLOORS.keys()


def test_stages_do_not_know_each_other():
    root, stages = PACKAGE / "stages", {"sft", "dpo", "upo", "kto"}
    for path in set(root.rglob("*.py")) - {root / "__init__.py"}:
        others = stages - {path.relative_to(root).parts[0].removesuffix(".py").split("_")[0]}
        known = {name.split(".")[2] for name in imports(path) if name.startswith("ernie_align.stages.")}
        assert not others & known, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_room_says_what_it_owns(path):
    """A method that overrides a documented one of the package may leave the docstring to it."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for name, node in public(tree):
        assert ast.get_docstring(node), f"{path}: {name} has no docstring"


@functools.cache
def classes() -> dict[str, tuple[set[str], set[str]]]:
    """Name of each class of the package -> names of its bases, and of its documented methods."""
    found = {}
    for node in (node for path in FILES for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)):
        documented = {item.name for item in node.body if isinstance(item, ast.FunctionDef) and ast.get_docstring(item)}
        found[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}, documented
    return found


def documented_above(bases: set[str]) -> set[str]:
    """Names of the methods that are documented in these classes of the package or above them."""
    known = [classes()[base] for base in bases if base in classes()]
    return set().union(*(methods | documented_above(above) for above, methods in known))


def public(scope: ast.AST, inherited: frozenset[str] = frozenset()) -> Iterator[tuple[str, ast.AST]]:
    """Public classes and functions, and the public methods of public classes that no base class documents. Trainer's
    callbacks say it by name."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(("_", "on_")):
            if node.name not in inherited:
                yield node.name, node
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                yield from public(node, frozenset(documented_above(bases)))


def test_no_cupboards():
    """Rooms are named for what they own."""
    names = {path.stem for path in FILES}
    assert not names & {"utils", "helpers", "common", "constants", "misc", "mixins"}


def test_the_command_line_and_recipes_import_no_torch():
    code = (
        "import sys, ernie_align.cli, ernie_align.recipe; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_checking_a_recipe_imports_no_torch(checkpoints, digits, tmp_path):
    import yaml

    from tests.support.runs import recipe_of

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("sft", checkpoints["vl_moe"], digits / "val.jsonl", tmp_path / "run")))
    code = (
        "import sys\n"
        f"sys.argv = ['ernie-align', 'check', {str(recipe)!r}]\n"
        "from ernie_align.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
